# SPDX-License-Identifier: Apache-2.0
"""A real model and a prompt of four KV pools: the bits are those of a pool that holds it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from engine import apart, generate, greedy, leaks, ledger_of, make_llm  # noqa: E402

DOCS = Path(__file__).resolve().parents[2] / "docs"
TOKENS, BLOCK = 2400, 32


def answer(model: str, text: str, blocks: int):
    """What the model says about a text, its pool's smallest size, and what was seen."""
    settings = {"token_budget": 160, "working_set_tokens": 96, "host_pool_gib": 0.2}
    settings["calibration"] = False
    llm = make_llm(
        settings,
        blocks=blocks,
        fits=False,
        model=model,
        dtype="float32",  # not every CPU has bfloat16 products
        max_model_len=TOKENS + 40,
        max_num_batched_tokens=256,
    )
    ids = llm.get_tokenizer()(text).input_ids[:TOKENS]
    params = greedy(16, stop=None, ignore_eos=True)
    outputs = generate(llm, [{"prompt_token_ids": ids}], params)
    ledger = ledger_of(llm)
    floor = ledger.limits.visit_room.floor(TOKENS + 40)
    return outputs[0], floor, ledger.admission.visitors, leaks(llm)


def test_a_real_models_prompt_of_four_pools(smollm2):
    if not DOCS.is_dir():
        pytest.skip("no docs folder beside the tests: the prompt is their text")
    text = "\n".join(page.read_text() for page in sorted(DOCS.glob("*.md")))
    large, floor, visitors, _ = apart(answer, str(smollm2), text, 100, timeout_s=900)
    assert large["told"]["mode"] == "sparse" and visitors == 0
    small, _, visitors, left = apart(answer, str(smollm2), text, floor + 1, timeout_s=900)
    assert visitors == 1 and not any(left.values()), left
    assert small["prompt_tokens"] == TOKENS > 4 * floor * BLOCK
    assert small["generated"] == large["generated"], "bit for bit"
