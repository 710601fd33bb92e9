# SPDX-License-Identifier: Apache-2.0
"""The accuracy benchmark on a real engine, with a few questions."""

from __future__ import annotations

from pathlib import Path

from engine import BLOCK, MODEL, SETTINGS, apart

from sentencekv_vllm.evaluation.engine import DENSE, VllmEngine
from sentencekv_vllm.evaluation.items import make_cells
from sentencekv_vllm.evaluation.records import Record, Results
from sentencekv_vllm.evaluation.runner import run

POLICIES = [DENSE, "sentencekv", "streaming"]
CELLS = make_cells(["niah_single"], ["restated", "answer_prefix"], [1500])


def ask(path: str) -> list[Record]:
    """Two questions of each cell under each policy."""
    engine = VllmEngine(
        Path(MODEL),
        SETTINGS,
        block_size=BLOCK,
        max_prompt_tokens=1500,
        max_policies=len(POLICIES),
        kv_cache_bytes=64 << 20,
    )
    results = Results(Path(path), SETTINGS)
    run(engine, results, CELLS, POLICIES, num_items=2)
    return list(results.records.values())


def test_one_engine_answers_every_policy_and_sparse_rows_are_sparse_from_the_first_step(tmp_path):
    records = apart(ask, str(tmp_path / "r.jsonl"))
    assert len(records) == len(CELLS) * 2 * len(POLICIES)
    by_policy = {p: [r for r in records if r.policy == p] for p in POLICIES}
    assert all(r.correct for r in by_policy[DENSE] + by_policy["sentencekv"])
    assert not all(r.correct for r in by_policy["streaming"])
    for record in by_policy[DENSE]:
        assert (record.mode, record.sparse_steps) == ("switched_off", 0)
    for record in by_policy["sentencekv"] + by_policy["streaming"]:
        assert record.sparse_steps == record.output_tokens - 1
    assert all(r.misses > 0 and 0 < r.coverage <= 1 for r in by_policy["sentencekv"])
