# SPDX-License-Identifier: Apache-2.0
"""Prompts longer than the GPU pool: the same bits as in a pool that holds them."""

from __future__ import annotations

import re
from functools import partial

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from engine import (  # noqa: E402
    apart,
    generate,
    greedy,
    is_clean,
    leaks,
    ledger_of,
    make_items,
    make_llm,
    record,
    runtime_of,
    scheduler_of,
)

apart = partial(apart, timeout_s=900)  # several engines of the suite may run side by side
LENGTHS = (4000, 3100, 3700)
CHUNK = 256
QUICK = {"dtype": "float32"}  # not every CPU has bfloat16 products; the prompts are long
DEEP = QUICK | {"load_format": "dummy", "hf_overrides": {"num_hidden_layers": 12}}  # random weights


class Watch:
    """Blocks held after a step, and steps in which a history visited."""

    def __init__(self, llm):
        self.most, self.visits = 0, 0
        scheduler = scheduler_of(llm)
        pool, schedule = scheduler.kv_cache_manager.block_pool, scheduler.schedule

        def watched(*args):
            output = schedule(*args)
            self.most = max(self.most, pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
            self.visits += output.kv_connector_metadata.message.visits is not None
            return output

        scheduler.schedule = watched


class Poison:
    """NaN in every block that nobody holds and in every private block, before each forward."""

    def __init__(self, llm):
        import torch

        runtime, manager = runtime_of(llm), scheduler_of(llm).kv_cache_manager
        private = manager.coordinator.single_type_managers[0]._private
        apply, poisoned = runtime.apply, set()

        def poison(message):
            apply(message)
            own = {b.block_id for blocks in private.values() for b in blocks}
            dead = {b.block_id for b in manager.block_pool.blocks if b.ref_cnt == 0 or b.is_null}
            fresh = torch.tensor(sorted(poisoned - dead - own), dtype=torch.long)
            unused, slots = (torch.tensor(sorted(s), dtype=torch.long) for s in (dead, own))
            for pools in runtime.pools.layers:
                pools.cache[fresh] = 0  # the unwritten rest of a block is multiplied by zero
                pools.cache[unused] = float("nan")
                slot, head = (pools.slot_page[slots] < 0).nonzero(as_tuple=True)
                pools.cache[slots[slot], head] = float("nan")
            poisoned.clear()
            poisoned.update(dead)

        runtime.apply = poison


def smallest(llm, tokens):
    return ledger_of(llm).limits.visit_room.floor(tokens)


def serve(blocks, lengths=LENGTHS, poisoned=False, staged=True, decode=24, settings=(), **engine):
    """Prompts in a pool of `blocks`; what they returned, and what was seen.

    One after the other, each without what is cached of the others: vLLM's matrix products depend
    on what else is in the batch, and who else is in it on the pool.
    """
    import sentencekv_vllm.worker.visits as visits

    if not staged:
        visits.page_stager = lambda device: lambda host, cache, pairs: None
    options = {"max_model_len": 4200, "max_num_batched_tokens": CHUNK, **QUICK, **engine}
    llm = make_llm(dict(settings), blocks=blocks, fits=False, **options)
    watch = Watch(llm)
    if poisoned:
        Poison(llm)
    items = make_items(llm, lengths)
    params = greedy(decode, stop=None, ignore_eos=True)
    outputs = []
    for item in items:
        outputs += generate(llm, [item.prompt], params)
        llm.reset_prefix_cache()
    seen = {
        "visitors": ledger_of(llm).admission.visitors,
        "visits": watch.visits,
        "most": watch.most,
        "floor": smallest(llm, 4200),
        "leaks": leaks(llm),
        "right": [
            o["generated"][0]["text"].startswith(item.target)
            for o, item in zip(outputs, items, strict=True)
        ],
    }
    return outputs, seen


def alike(small, large):
    assert all(o["told"]["mode"] == "sparse" for o in large)
    for a, b in zip(small, large, strict=True):
        assert a["generated"] == b["generated"]


CASES = {  # chunks of whole blocks: a resident's copies then keep up, as a visitor's always do
    "chunks of 256": {},
    "chunks of 512, bfloat16": {"max_num_batched_tokens": 512, "dtype": "bfloat16"},
    "chunks of 384, blocks of 128": {"max_num_batched_tokens": 384, "block_size": 128},
    "without prefix caching, float16": {"enable_prefix_caching": False, "dtype": "float16"},
    "asynchronous": {"async_scheduling": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_small_pool_has_the_bits_of_a_large_one(case):
    """tiny-recall has four layers, so staging alone is a quarter of a prompt."""
    engine = CASES[case]
    blocks = 560 * 32 // engine.get("block_size", 32)
    lengths = LENGTHS if not engine else LENGTHS[1:2]
    large, resident = apart(serve, blocks, lengths, **engine)
    assert resident["visitors"] == resident["visits"] == 0
    small, seen = apart(serve, resident["floor"] + 1, lengths, **engine)
    assert seen["visitors"] == len(lengths) and seen["visits"] > 5, seen
    assert seen["most"] <= seen["floor"] and not any(seen["leaks"].values()), seen
    alike(small, large)
    assert any(seen["right"]), seen


@pytest.mark.slow
def test_a_prompt_of_four_pools_and_more():
    """Twelve layers: the longest prompt has more than five times the blocks of the pool."""
    lengths = (4000,)
    large, _ = apart(serve, 300, lengths, **DEEP)
    small, seen = apart(serve, 25, lengths, **DEEP)
    assert seen["floor"] <= 24 and seen["visits"] > 5 and not any(seen["leaks"].values()), seen
    assert small[0]["prompt_tokens"] > 5 * 24 * 32
    alike(small, large)


def queue(count, blocks):
    """Many such prompts at once, half of them alike, in a pool of less than a quarter of one."""
    settings = {"token_budget": 160, "working_set_tokens": 96, "host_pool_gib": 0.2}
    llm = make_llm(
        settings, blocks=blocks, fits=False, max_model_len=1820, max_num_batched_tokens=128,
        max_num_seqs=4, **DEEP,
    )  # fmt: skip
    watch, engine = Watch(llm), llm.llm_engine
    prompts = [item.prompt for item in make_items(llm, [1800] * (count // 2))] * 2
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy(4, stop=None, ignore_eos=True))
    outputs = {}
    for _ in range(3000):
        if not engine.has_unfinished_requests():
            break
        outputs |= {o.request_id: record(o) for o in engine.step() if o.finished}
    visitors = ledger_of(llm).admission.visitors
    return [outputs[str(i)] for i in range(count)], visitors, watch.visits, leaks(llm)


@pytest.mark.slow
def test_sixteen_prompts_of_four_pools_queue_and_finish():
    outputs, visitors, visits, left = apart(queue, 16, 14)
    assert visitors >= 16 and visits > 16 and not any(left.values()), left
    assert min(o["prompt_tokens"] for o in outputs) > 4 * 13 * 32
    for a, b in zip(outputs[:8], outputs[8:], strict=True):
        assert len(a["generated"][0]["tokens"]) == 4
        assert a["generated"][0]["tokens"] == b["generated"][0]["tokens"]


@pytest.mark.slow
def test_freed_blocks_are_not_read_and_what_is_staged_is():
    clean, _ = apart(serve, 60, LENGTHS[:1])
    poisoned, seen = apart(serve, 60, LENGTHS[:1], poisoned=True)
    assert seen["visits"] > 5
    assert poisoned[0]["generated"] == clean[0]["generated"]
    broken, _ = apart(serve, 60, LENGTHS[:1], poisoned=True, staged=False, decode=1)
    first = broken[0]["generated"][0]["logprobs"][:1]
    assert first != clean[0]["generated"][0]["logprobs"][:1], "the control must break"


def crowd():
    """Many of them, among short ones, aborts and preemptions; nothing stays behind."""
    llm = make_llm(
        {"segmenter": "auto"},
        blocks=100,
        fits=False,
        max_model_len=4200,
        max_num_batched_tokens=CHUNK,
        **QUICK,
    )
    engine = llm.llm_engine
    items = make_items(llm, [4000, 200, 3600, 900, 4000, 300] * 2 + [3900, 4000])
    params = greedy(24, stop=None, ignore_eos=True)
    scheduler, done = scheduler_of(llm), {}
    names = {engine.add_request(str(i), x.prompt, params): i for i, x in enumerate(items)}
    for step in range(100000):
        if not engine.has_unfinished_requests():
            break
        for output in engine.step():
            if output.finished:
                done[int(output.request_id.split("-")[0])] = output
        if step in (12, 60) and scheduler.running:
            request = scheduler.running.pop()
            scheduler._preempt_request(request, 0.0)
        if step == 20:
            (victim,) = [name for name, i in names.items() if i == 2]
            engine.abort_request([victim], internal=True)
    wrong = [i for i, o in done.items() if not o.outputs[0].text.startswith(items[i].target)]
    return sorted(done), wrong, leaks(llm), is_clean(llm), ledger_of(llm).admission.visitors


@pytest.mark.slow
def test_a_crowd_of_them_is_served_and_leaves_nothing_behind():
    done, wrong, left, clean, visitors = apart(crowd)
    assert done == [i for i in range(14) if i != 2]
    assert clean and not any(left.values()), left
    assert not wrong and visitors >= 7


def limits():
    """What is refused at arrival, where answers end, and who is served behind them."""
    from vllm.exceptions import VLLMValidationError

    llm = make_llm(
        {"min_context_tokens": 2048}, blocks=61, fits=False, max_model_len=4200,
        max_num_batched_tokens=CHUNK, **QUICK,
    )  # fmt: skip
    short, long = (item.prompt for item in make_items(llm, (300, 4000)))
    off = {"extra_args": {"sentencekv": "off"}}
    errors = []
    for options in (off, {"extra_args": {"sentencekv_policy": "full"}}):
        try:
            generate(llm, [long], greedy(4, **options))
        except VLLMValidationError as error:
            errors.append(str(error))
    forever = greedy(4000, stop=None, ignore_eos=True, logprobs=None)
    dense = greedy(4000, stop=None, ignore_eos=True, logprobs=None, **off)
    outputs = generate(llm, [short, short, long, short], [dense, forever, greedy(4), greedy(4)])
    return errors, outputs, leaks(llm), ledger_of(llm).admission.visitors


@pytest.mark.slow
def test_what_cannot_be_served_to_its_end_is_refused_or_ends():
    errors, (dense, grows, long, behind), left, visitors = apart(limits)
    assert len(errors) == 2, errors
    for error in errors:
        assert re.search("needs 1[0-9]+ KV blocks of 32, the pool has 60", error), error
        assert re.search("send at most 1920 tokens", error), error
    total = dense["prompt_tokens"] + len(dense["generated"][0]["tokens"])
    assert total == 60 * 32 + 1 and dense["generated"][0]["finish"] == "length"
    total = grows["prompt_tokens"] + len(grows["generated"][0]["tokens"])
    assert total > 4000 and grows["told"]["mode"] == "sparse"
    assert len(long["generated"][0]["tokens"]) and len(behind["generated"][0]["tokens"])
    assert visitors >= 1 and not any(left.values()), left


def grown():
    """A prompt that fits, and with its answer no longer does when it is preempted."""
    llm = make_llm(
        {}, blocks=49, fits=False, max_model_len=3000, max_num_batched_tokens=CHUNK,
        enable_prefix_caching=False, **QUICK,
    )  # fmt: skip
    engine, scheduler = llm.llm_engine, scheduler_of(llm)
    long, short = (item.prompt for item in make_items(llm, (1400, 300)))
    forever = greedy(1500, stop=None, ignore_eos=True, logprobs=None)
    name = engine.add_request("grows", long, forever)
    outputs, preempted = {}, 0
    for _ in range(6000):
        if not engine.has_unfinished_requests():
            break
        for output in engine.step():
            if output.finished:
                outputs[output.request_id] = record(output)
        request = scheduler.requests.get(name)
        if request is not None and request.num_tokens == 2200 and not preempted:
            preempted = len(scheduler.running)
            scheduler._preempt_request(scheduler.running.pop(), 0.0)
            engine.add_request("behind", short, greedy(4))
    return outputs, preempted, ledger_of(llm).admission.visitors, leaks(llm)


@pytest.mark.slow
def test_who_outgrows_the_pool_and_is_preempted_is_prefilled_by_visits():
    outputs, preempted, visitors, left = apart(grown)
    assert preempted == 1 and visitors == 1 and not any(left.values()), left
    assert len(outputs["grows"]["generated"][0]["tokens"]) == 1500
    assert outputs["grows"]["prompt_tokens"] < 48 * 32 < 2200, "it fitted, and then it did not"
    assert outputs["behind"]["generated"][0]["tokens"]


def start_up(blocks):
    try:
        llm = make_llm(
            {}, blocks=blocks, fits=False, max_model_len=4200, max_num_batched_tokens=CHUNK
        )
    except Exception as error:
        return str(error), None
    item = make_items(llm, (4100,))[0]
    return None, generate(llm, [item.prompt], greedy(8))[0]["prompt_tokens"]


@pytest.mark.slow
def test_the_smallest_pool_serves_and_one_block_less_does_not_start():
    floor = 1 + 11 + 32  # sinks, window and chunk, a quarter of 129 - 1 blocks of history
    error, served = apart(start_up, floor + 1)
    assert error is None and served > 4000
    error, _ = apart(start_up, floor)
    assert error is not None and "4200" in error


@pytest.mark.slow
def test_without_the_setting_the_pool_must_hold_a_request():
    error, _ = apart(start_up_without)
    assert error is not None


def start_up_without():
    try:
        make_llm({"visits": False}, blocks=60, fits=False, max_model_len=4200)
    except Exception as error:
        return str(error), None
    return None, None
