# SPDX-License-Identifier: Apache-2.0
"""An image in the prompt: its keys and values are history like any others."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from engine import MODEL, apart, generate, greedy, is_clean, make_items, make_llm  # noqa: E402
from tiny_vl import prompt, without_video, write_model  # noqa: E402

FULL = {"policy": "full", "stay_dense_when_covered": False, "working_set_tokens": 3200}
NARROW = {"stay_dense_when_covered": False}
LENGTHS = (300, 900)  # tokens before and behind the image


def answers(folder, settings):
    """Two prompts that differ in their image alone, at once; then the first one again, and a
    second turn."""
    without_video()
    llm = make_llm(
        settings,
        model=folder,
        max_model_len=4096,
        blocks=400,
        limit_mm_per_prompt={"image": 1, "video": 0},
    )
    before, behind = (item.prompt for item in make_items(llm, LENGTHS))
    params = greedy(40, stop=None, ignore_eos=True)
    first, second = prompt(before, behind, seed=1), prompt(before, behind, seed=2)
    batch = generate(llm, [first, second], params)
    again = generate(llm, [first], params)
    turn = prompt(before, behind + batch[0]["generated"][0]["text"] + " and then?", seed=1)
    again += generate(llm, [turn], params)
    return batch + again, settings is None or is_clean(llm)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    write_model(folder, MODEL)
    return str(folder)


@pytest.fixture(scope="module")
def dense(folder):
    return apart(answers, folder, None)[0]


@pytest.mark.slow
def test_with_everything_selected_an_image_is_seen_as_by_stock_attention(folder, dense):
    outputs, clean = apart(answers, folder, FULL)
    assert clean
    for mine, stock in zip(outputs, dense, strict=True):
        assert mine["told"]["mode"] == "sparse" and mine["told"]["blocks_released"] > 20
        assert mine["generated"] == stock["generated"]
        assert mine["cached"] == stock["cached"]
    one, other, again, turn = outputs
    assert one["prompt_tokens"] > sum(LENGTHS) + 100, "the placeholders of the image"
    assert one["generated"] != other["generated"], "the image counts"
    assert again["generated"] == one["generated"] and again["cached"] > one["prompt_tokens"] - 64
    assert turn["cached"] >= one["prompt_tokens"] // 32 * 32


@pytest.mark.slow
def test_under_a_budget_nothing_of_an_image_is_left_behind_or_mixed_up(folder, dense):
    outputs, clean = apart(answers, folder, NARROW)
    assert clean
    one, other, again, _ = outputs
    for output in outputs:
        assert output["told"]["mode"] == "sparse" and output["told"]["blocks_released"] > 20
    assert one["generated"] != other["generated"]
    # Prefill is exact: what the prompt's end says is what stock attention says.
    for mine, stock in zip(outputs[:3], dense[:3], strict=True):
        assert mine["generated"][0]["logprobs"][0] == stock["generated"][0]["logprobs"][0]
    assert again["generated"] == one["generated"], "the same blocks, found again"
