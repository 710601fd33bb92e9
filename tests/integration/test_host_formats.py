# SPDX-License-Identifier: Apache-2.0
"""A swap pool of lower precision on a served model: the answers stay, the bytes halve."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from engine import apart, generate, is_clean, make_items, make_llm, runtime_of  # noqa: E402

pytestmark = pytest.mark.vllm

QUESTIONS = 10


def answers(host_kv_dtype: str) -> tuple[list[str], Counter[str], int, bool]:
    """First lines of the answers, what was counted, pages of the pool, whether nothing is held."""
    llm = make_llm({"host_kv_dtype": host_kv_dtype})
    runtime = runtime_of(llm)
    counted: Counter[str] = Counter()
    take = runtime.take_counters

    def counting() -> dict[str, int]:
        taken = take()
        counted.update(taken)
        return taken

    runtime.take_counters = counting
    items = make_items(llm, [1500] * QUESTIONS, seed=40, task="niah_multiquery")
    outputs = [generate(llm, [item.prompt])[0] for item in items]
    assert all(o["told"] is None or o["told"]["mode"] == "sparse" for o in outputs)
    counting()
    texts = [output["generated"][0]["text"] for output in outputs]
    return texts, counted, runtime.pools.host.shape[1], is_clean(llm)


def test_int8_pages_answer_as_exact_ones_and_move_half_the_bytes() -> None:
    texts, exact, pages, clean = apart(answers, "auto")
    coarse_texts, coarse, coarse_pages, coarse_clean = apart(answers, "int8")
    assert clean and coarse_clean
    assert sum(a == b for a, b in zip(texts, coarse_texts, strict=True)) >= 0.9 * QUESTIONS
    assert exact["misses"] > 100 and coarse["misses"] > 100
    share = 0.5 + 2 / 64  # a code, and a step and a low of 2 bytes for 64 elements of 2 bytes
    per_miss = [c["swap_in_bytes"] / c["misses"] for c in (exact, coarse)]
    assert per_miss[1] == share * per_miss[0]
    assert coarse["swap_out_bytes"] == share * exact["swap_out_bytes"] > 0
    assert coarse_pages == pytest.approx(pages / share, rel=0.01)
