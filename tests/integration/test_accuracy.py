# SPDX-License-Identifier: Apache-2.0
"""`sentencekv eval` on a real engine, with a few questions."""

from __future__ import annotations

import math

from engine import BLOCK, MODEL, SETTINGS, apart

from sentencekv_vllm.evaluation.engine import VllmEngine
from sentencekv_vllm.evaluation.items import interleave, make_cells, recall_problems
from sentencekv_vllm.evaluation.records import Record
from sentencekv_vllm.evaluation.runner import run
from sentencekv_vllm.evaluation.variant import DENSE, Variant, make_variants

VARIANTS = make_variants([DENSE, "sentencekv", "streaming", "full"], [192, 256])
CELLS = make_cells(["niah_single", "multi_turn"], ["restated", "answer_prefix"], [1500])


def ask(variants: list[Variant], with_kl: bool) -> list[Record]:
    """Two questions of each cell in each variant."""
    engine = VllmEngine(
        MODEL,
        SETTINGS,
        block_size=BLOCK,
        max_prompt_tokens=1500,
        max_requests=2 * (len(variants) + 1),
        kv_cache_bytes=128 << 20,
    )
    records: list[Record] = []
    problems = list(interleave(recall_problems(CELLS, 2)))
    run(engine, problems, variants, (), records.append, batch=2, with_kl=with_kl)
    return records


def test_one_engine_answers_every_variant_and_sparse_rows_are_sparse_from_the_first_step():
    records = apart(ask, VARIANTS, with_kl=True)
    assert len(records) == len(CELLS) * 2 * len(VARIANTS)
    by_name = {v.name: [r for r in records if r.variant == v.name] for v in VARIANTS}
    assert all(r.score == 1 for name in (DENSE, "sentencekv") for r in by_name[name])
    assert not all(r.score for r in by_name["streaming"])
    for record in by_name[DENSE]:
        assert (record.mode, record.sparse_steps, record.kl) == ("switched_off", 0, 0)
    for record in by_name["sentencekv"] + by_name["streaming"]:
        assert record.sparse_steps == record.output_tokens - 1
    assert all(r.misses > 0 and 0 < r.coverage <= 1 for r in by_name["sentencekv"])
    # Forced answers: what is attended to decides how far the distributions move.
    kl = {name: [r.kl for r in found] for name, found in by_name.items()}
    assert all(0 <= value < 0.05 for value in kl["sentencekv"] + kl["full"])
    assert max(kl["streaming"]) > 10 * max(kl["sentencekv"])
    assert all(math.isfinite(value) for values in kl.values() for value in values)


def test_a_second_turn_finds_its_dense_prompt_but_no_kv_of_sparse_attention():
    records = apart(ask, [Variant("sentencekv", 192)], with_kl=False)
    for record in (r for r in records if r.task == "multi_turn"):
        assert record.score == 1
        begun = BLOCK if record.style == "answer_prefix" else 0  # words of the answer
        question = (1500 + begun) // BLOCK * BLOCK
        assert 0.9 * question < record.cached_tokens <= question < record.prompt_tokens
