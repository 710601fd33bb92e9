# SPDX-License-Identifier: Apache-2.0
"""Prefix caching stays on, and never hands out what sparse attention computed."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from engine import BLOCK, apart, generate, greedy, is_clean, make_items, make_llm  # noqa: E402


def two_turns(settings):
    llm = make_llm(settings)
    tokenizer = llm.get_tokenizer()
    first = tokenizer(make_items(llm, (1500,))[0].prompt).input_ids
    params = greedy(200, stop=None, ignore_eos=True)
    one = generate(llm, [{"prompt_token_ids": first}], params)[0]
    longer = first + one["generated"][0]["tokens"] + first[1:90]
    two = generate(llm, [{"prompt_token_ids": longer}], params)[0]
    again = generate(llm, [{"prompt_token_ids": first}], params)[0]
    return len(first), one, two, again, is_clean(llm)


@pytest.mark.slow
def test_a_second_turn_recomputes_what_sparse_attention_wrote():
    prompt, one, two, again, clean = apart(two_turns, {})
    assert one["told"]["mode"] == two["told"]["mode"] == "sparse"
    assert two["cached"] == prompt // BLOCK * BLOCK, "the prompt, no generated token"
    assert again["cached"] >= (prompt - 1) // BLOCK * BLOCK - BLOCK
    assert again["generated"] == one["generated"], "hit and no hit give the same bits"
    assert clean


@pytest.mark.slow
def test_exact_generations_are_cached():
    full = {"policy": "full", "stay_dense_when_covered": False, "working_set_tokens": 3200}
    prompt, one, two, _, clean = apart(two_turns, full)
    assert one["told"]["mode"] == "sparse"
    assert two["cached"] > prompt + 100
    assert clean


def samples(settings):
    llm = make_llm(settings)
    prompt = make_items(llm, (1500,))[0].prompt
    from vllm import SamplingParams

    params = SamplingParams(
        n=3, temperature=0.7, seed=5, max_tokens=24, ignore_eos=True, logprobs=5
    )
    return generate(llm, [prompt], params)[0], settings is None or is_clean(llm)


@pytest.mark.slow
def test_several_samples_of_one_prompt():
    full = {"policy": "full", "stay_dense_when_covered": False, "working_set_tokens": 2048}
    (dense, _), (exact, clean) = apart(samples, None), apart(samples, full)
    assert clean and len(exact["generated"]) == 3
    assert exact["generated"] == dense["generated"]
    sparse, clean = apart(samples, {})
    assert clean and [len(g["tokens"]) for g in sparse["generated"]] == [24] * 3
