# SPDX-License-Identifier: Apache-2.0
"""I7: every way to decode has a name, the response tells it, and it is counted."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from engine import (  # noqa: E402
    apart,
    generate,
    greedy,
    is_clean,
    ledger_of,
    make_items,
    make_llm,
    scheduler_of,
)

PAGE_GIB = 4 * 2 * 2 * 32 * 64 * 2 / 2**30  # a block of every layer of the embedded model


def counted(llm):
    """Finished requests by reason; the counter behind `vllm:sentencekv_requests`."""
    return Counter({str(reason): n for reason, n in ledger_of(llm).finished.items()})


def one_of_each():
    llm = make_llm({"index_vectors": 1}, enable_prompt_embeds=True)
    short, middle, long = (i.prompt for i in make_items(llm, (150, 270, 1500)))
    tokens = llm.get_tokenizer()(long).input_ids

    def mode(prompt, **extra):
        params = greedy(4, extra_args={f"sentencekv{k}": v for k, v in extra.items()})
        return generate(llm, [prompt], params)[0]["told"]["mode"]

    modes = {
        "sparse": mode(long),
        "short_context": mode(short),
        "budget_covers": mode(middle),
        "switched_off": mode(long, **{"": "off"}),
        "policy_full": mode(long, _policy="full"),
    }
    model = scheduler_of(llm).vllm_config.model_config
    import torch

    embeds = torch.zeros(400, model.get_hidden_size(), dtype=model.dtype)
    modes["unsupported_input"] = mode({"prompt_embeds": embeds})

    segmentation = ledger_of(llm).segmentation
    poll, segmentation.poll = segmentation.poll, lambda *args, **kwargs: None
    reversed_tokens = {"prompt_token_ids": tokens[::-1]}
    modes["segmenting"] = mode(reversed_tokens, _policy="sentencekv-paper")
    segmentation.poll = poll

    copying = ledger_of(llm)._copying
    copying.copy_out = lambda *args: None
    modes["copying"] = mode({"prompt_token_ids": tokens[5:]})
    del copying.copy_out
    modes["short_answer"] = generate(llm, [long], greedy(1))[0]["told"]["mode"]
    return modes, counted(llm), is_clean(llm)


@pytest.mark.slow
def test_each_reason_is_told_and_counted():
    modes, counts, clean = apart(one_of_each)
    assert modes == {reason: reason for reason in modes}
    for reason in modes:
        assert counts[reason] == 1, reason
    assert counts.total() == len(modes)
    assert clean


def full_pool(on_pool_full):
    """Two requests of 46 pages and one of 92, over a pool of 52 pages."""
    llm = make_llm(
        {
            "host_pool_gib": 52.5 * PAGE_GIB,
            "on_pool_full": on_pool_full,
            "sentence_tokens_per_row": 8,  # short sentences take no pages of their own
        },
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
    )
    scheduler = scheduler_of(llm)
    assert ledger_of(llm).pages.num_pages == 52
    prompts = [item.prompt for item in make_items(llm, (1500, 1500, 3000))]
    params = greedy(20, stop=None, ignore_eos=True)
    engine, ends, most = llm.llm_engine, {}, 0
    names = [engine.add_request(str(i), prompt, params) for i, prompt in enumerate(prompts)]
    steps = 0
    while engine.has_unfinished_requests():
        assert steps < 200, "somebody waits for ever"
        steps += 1
        for output in engine.step():
            if output.finished:
                ends[output.request_id] = steps, output.kv_transfer_params["sentencekv"]["mode"]
        most = max(most, len(scheduler.running))
    assert len(names) == 3
    return ends, most, counted(llm), is_clean(llm)


@pytest.mark.slow
def test_a_full_host_pool_keeps_requests_dense():
    ends, most, counts, clean = apart(full_pool, "dense")
    assert most == 3, "nobody waits"
    assert [ends[i][1] for i in "012"] == ["sparse", "host_pool_full", "host_pool_full"]
    assert counts == {"sparse": 1, "host_pool_full": 2}
    assert clean


@pytest.mark.slow
def test_with_wait_requests_wait_for_pages_but_not_for_ever():
    ends, most, counts, clean = apart(full_pool, "wait")
    assert ends["0"][1] == ends["1"][1] == "sparse"
    assert ends["1"][0] >= ends["0"][0] + 20, "the second starts when the first has ended"
    assert "2" in ends, "larger than the pool: admitted, not waiting for ever"
    assert clean


def sharers():
    """Two identical prompts in a pool with no room for two working sets."""
    settings = {"working_set_tokens": 1280, "host_pool_gib": 0.1}
    llm = make_llm(settings, blocks=70, max_num_batched_tokens=2048)
    prompt = make_items(llm, (1500,))[0].prompt
    outputs = generate(llm, [prompt, prompt], greedy(12, stop=None, ignore_eos=True))
    return [o["told"]["mode"] for o in outputs], outputs, counted(llm), is_clean(llm)


@pytest.mark.slow
def test_sharers_keep_the_blocks_whose_release_gains_nothing():
    modes, outputs, counts, clean = apart(sharers)
    assert "no_gain" in modes and counts["no_gain"] == modes.count("no_gain")
    assert outputs[1]["cached"] > 1000, "the second shares the first one's blocks"
    assert clean


def with_room():
    """One request in a pool for two dense ones, then four at once."""
    llm = make_llm({"min_context_tokens_with_room": 4000}, blocks=110)
    engine, scheduler, modes, most = llm.llm_engine, scheduler_of(llm), [], []
    items = make_items(llm, [1500] * 5)
    params = greedy(60, stop=None, ignore_eos=True)
    right = []
    for batch in (items[:1], items[1:]):
        running = []
        asked = {str(len(modes) + i): item for i, item in enumerate(batch)}
        for name, item in asked.items():
            engine.add_request(name, item.prompt, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    modes.append(output.kv_transfer_params["sentencekv"]["mode"])
                    text = output.outputs[0].text
                    right.append(text.startswith(asked[output.request_id].target))
            running.append(len(scheduler.running))
        most.append(max(running))
    return modes, most, right, counted(llm), is_clean(llm)


@pytest.mark.slow
def test_with_room_requests_are_dense_and_without_it_more_of_them_run():
    modes, most, right, counts, clean = apart(with_room)
    assert modes[0] == "room", "alone, it has room"
    assert modes[1:4] == ["sparse"] * 3, "they made room for the fourth, which then had it"
    assert most == [1, 4], "twice as many as fit densely"
    assert all(right)
    assert counts == Counter(modes)
    assert clean
