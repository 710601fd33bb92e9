# SPDX-License-Identifier: Apache-2.0
"""I1: with everything attended to, outputs equal stock attention's bit for bit."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from engine import apart, generate, greedy, is_clean, make_items, make_llm  # noqa: E402

FULL = {"policy": "full", "stay_dense_when_covered": False, "working_set_tokens": 3200}
COVERING = {"token_budget": 3296, "stay_dense_when_covered": False, "working_set_tokens": 3200}
LENGTHS = (300, 1500, 40, 700, 3001, 257, 2200, 900, 1100)  # one more than run at once


def mixed(settings, **engine):
    """A batch of mixed lengths, then the same again, half of it, and a longer prompt."""
    llm = make_llm(settings, **engine)
    prompts = [item.prompt for item in make_items(llm, LENGTHS)]
    params = greedy(48, stop=None, ignore_eos=True)
    batch = generate(llm, prompts, params)
    body = prompts[4]
    again = [
        generate(llm, [prompt], params)[0]
        for prompt in (body, body[: len(body) // 2], body + batch[4]["generated"][0]["text"])
    ]
    return batch + again, settings is None or is_clean(llm)


def one_by_one(settings, multiprocess):
    """A batch's composition depends on when requests arrive at another process."""
    llm = make_llm(settings, multiprocess)
    return [
        generate(llm, [item.prompt], greedy(24, stop=None, ignore_eos=True))[0]
        for item in make_items(llm, (1500, 700))
    ]


@pytest.fixture(scope="session")
def dense():
    """Outputs of vLLM's own backend, once for each way of running it."""
    known = {}

    def outputs(**engine):
        key = repr(sorted(engine.items()))
        if key not in known:
            known[key] = apart(mixed, None, **engine)[0]
        return known[key]

    return outputs


CASES = {
    "full": (FULL, {}),
    "covering": (COVERING, {}),
    "full, chunks of 256": (FULL, {"max_num_batched_tokens": 256}),
    "full, fp32": (FULL, {"dtype": "float32"}),
    "full, blocks of 128": (FULL, {"block_size": 128, "blocks": 400}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_full_attention_is_bit_identical_to_stock_attention(case, dense):
    settings, engine = CASES[case]
    outputs, clean = apart(mixed, settings, **engine)
    expected = dense(**engine)
    for mine, stock in zip(outputs, expected, strict=True):
        length = stock["prompt_tokens"]
        assert mine["generated"] == stock["generated"], f"prompt of {length} tokens"
        assert mine["cached"] == stock["cached"], f"prompt of {length} tokens"
        if length >= 300:
            assert mine["told"]["mode"] == "sparse", f"prompt of {length} tokens"
    assert outputs[-3]["cached"] and outputs[-2]["cached"] and outputs[-1]["cached"]
    assert clean


@pytest.mark.slow
def test_an_engine_core_in_a_process_of_its_own_gives_the_same_bits():
    outputs, expected = apart(one_by_one, FULL, True), apart(one_by_one, None, False)
    assert [o["told"]["mode"] for o in outputs] == ["sparse", "sparse"]
    assert [o["generated"] for o in outputs] == [o["generated"] for o in expected]
