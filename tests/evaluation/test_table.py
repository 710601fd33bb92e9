# SPDX-License-Identifier: Apache-2.0
"""Accuracy tables: intervals, the questions that count, and their text."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from sentencekv_vllm.evaluation.items import Cell
from sentencekv_vllm.evaluation.records import Record
from sentencekv_vllm.evaluation.table import Share, markdown, summarise

CELL = Cell("niah_single", "restated", 4096)
OTHER = Cell("niah_single", "restated", 8192)
POLICIES = ["dense", "sentencekv"]


def record(seed: int, policy: str, correct: bool, cell: Cell = CELL, **changes) -> Record:
    sparse = policy != "dense"
    found = Record(
        **dataclasses.asdict(cell),
        seed=seed,
        policy=policy,
        correct=correct,
        text="x",
        target="x",
        output_tokens=11,
        mode="sparse" if sparse else "switched_off",
        sparse_steps=10 if sparse else 0,
        hits=30 if sparse else 0,
        misses=10 if sparse else 0,
        coverage=0.5 if sparse else 0.0,
    )
    return dataclasses.replace(found, **changes)


@pytest.mark.parametrize(
    "part,whole,low,high",
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (95, 100, 0.8882, 0.9785),
    ],
)
def test_wilson_interval_has_the_published_values(part, whole, low, high):
    assert Share(part, whole).interval == pytest.approx((low, high), abs=1e-4)


def test_more_questions_narrow_the_interval_around_the_same_share():
    (a, b), (c, d) = Share(9, 10).interval, Share(90, 100).interval
    assert a < c < 0.9 < d < b


def test_nothing_observed_says_nothing():
    share = Share(0, 0)
    assert share.interval == (0.0, 1.0)
    assert math.isnan(share.value)
    assert str(share) == "-"


def test_only_questions_that_dense_attention_solves_count_as_kept():
    records = [record(seed, "dense", seed < 3) for seed in range(4)]
    records += [record(seed, "sentencekv", seed in (0, 1, 3)) for seed in range(4)]
    _, row, *_ = summarise(records, [CELL], POLICIES, head_block_bytes=8192)
    assert (row.exact.part, row.exact.whole) == (3, 4)
    assert (row.kept.part, row.kept.whole) == (2, 3)


def test_each_table_says_how_many_questions_it_rests_on():
    records = [record(seed, p, seed < 3) for seed in range(4) for p in POLICIES]
    exact, kept, traffic = markdown(summarise(records, [CELL], POLICIES, 8192), POLICIES).split(
        "\n\n| "
    )[1:]
    assert f"{CELL} | 4 | 0.75 (0.30-0.95) | 0.75 (0.30-0.95) |" in exact
    assert f"{CELL} | 3 | 1.00 (0.44-1.00) |" in kept
    assert f"{CELL} | 4 | 0.75, 8, 0.50 |" in traffic


def test_a_question_that_one_policy_has_not_answered_counts_for_none():
    records = [record(seed, "dense", True) for seed in range(4)]
    records += [record(seed, "sentencekv", True) for seed in range(2)]
    assert {row.exact.whole for row in summarise(records, [CELL], POLICIES, 8192)} == {2}


def test_the_last_rows_pool_all_cells():
    records = [record(0, p, True, cell) for p in POLICIES for cell in (CELL, OTHER)]
    rows = summarise(records, [CELL, OTHER], POLICIES, head_block_bytes=8192)
    assert [row.cell for row in rows] == [CELL, CELL, OTHER, OTHER, None, None]
    assert rows[-1].exact.whole == 2


def test_traffic_is_bytes_of_missed_head_blocks_a_sparse_step():
    records = [record(s, p, True) for s in range(2) for p in POLICIES]
    dense, ours, *_ = summarise(records, [CELL], POLICIES, head_block_bytes=8192)
    assert ours.swapped_bytes_per_step == 8192
    assert ours.hits.value == 0.75
    assert math.isnan(dense.swapped_bytes_per_step)


def test_steps_that_ran_densely_are_pointed_out():
    records = [record(0, "dense", True), record(0, "sentencekv", True)]
    assert "flatter" not in markdown(summarise(records, [CELL], POLICIES, 8192), POLICIES)
    records[1] = dataclasses.replace(records[1], sparse_steps=5)
    text = markdown(summarise(records, [CELL], POLICIES, 8192), POLICIES)
    assert f"{CELL}, sentencekv: sparse in 50.0%" in text


def test_a_row_is_plain_json_whatever_is_missing():
    for row in summarise([], [CELL], POLICIES, head_block_bytes=8192):
        json.loads(json.dumps(row.as_dict(), allow_nan=False))


def test_unknown_coverage_is_left_out_of_the_mean():
    records = [record(i, "dense", True) for i in range(3)]
    records += [record(0, "p", True, coverage=0.4), record(1, "p", True, coverage=None)]
    records += [record(2, "p", True, coverage=0.6)]
    records += [record(i, "q", True, coverage=None) for i in range(3)]
    rows = {row.policy: row for row in summarise(records, [CELL], ["dense", "p", "q"], 1)}
    assert rows["p"].coverage == pytest.approx(0.5)
    assert math.isnan(rows["q"].coverage)
