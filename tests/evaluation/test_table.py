# SPDX-License-Identifier: Apache-2.0
"""Accuracy tables: intervals, the questions that count, and their text."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from sentencekv_vllm.evaluation.items import Cell
from sentencekv_vllm.evaluation.kv_shape import KVShape
from sentencekv_vllm.evaluation.markdown import markdown
from sentencekv_vllm.evaluation.share import Share
from sentencekv_vllm.evaluation.table import summarise
from sentencekv_vllm.evaluation.variant import DENSE, Variant

CELL = Cell("niah_single", "restated", 4096)
OTHER = Cell("niah_single", "restated", 8192)
VARIANTS = [Variant(DENSE), Variant("sentencekv", 256)]
SHAPE = KVShape(head_dim=64, block_size=32)


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


def test_only_questions_that_dense_attention_solves_count_as_kept(record):
    dense, ours = VARIANTS
    records = [record(seed, dense, seed < 3) for seed in range(4)]
    records += [record(seed, ours, seed in (0, 1, 3)) for seed in range(4)]
    _, row, *_ = summarise(records, [CELL], VARIANTS, SHAPE)
    assert (row.exact.part, row.exact.whole) == (3, 4)
    assert (row.kept.part, row.kept.whole) == (2, 3)


def test_each_table_says_how_many_questions_it_rests_on(record):
    records = [record(seed, v, seed < 3) for seed in range(4) for v in VARIANTS]
    text = markdown(summarise(records, [CELL], VARIANTS, SHAPE), VARIANTS)
    pooled, exact, kept, traffic = text.split("\n\n| ")[1:]
    interval = "0.75 (0.30-0.95)"
    assert (
        f"sentencekv @ 256 | - | 4 | {interval} | 1.00 (0.44-1.00) | 0.2500 ± 0.0000 | 0.75 | 8 |"
        in pooled
    )
    assert f"{CELL} | 4 | {interval} | {interval} |" in exact
    assert f"{CELL} | 3 | 1.00 (0.44-1.00) |" in kept
    assert f"{CELL} | 4 | 0.75, 8, 0.50 |" in traffic


def test_the_longer_list_goes_down(record):
    many = [Variant("random", 128 * n) for n in range(1, 5)]
    records = [record(seed, v, 1) for seed in range(4) for v in many]
    *_, exact, _, _ = markdown(summarise(records, [CELL], many, SHAPE), many).split("\n\n| ")
    assert exact.startswith(f"policy @ budget | {CELL} (4) | all (4) |")
    assert "\n| random @ 512 | 1.00 (0.51-1.00) | 1.00 (0.51-1.00) |" in exact


def test_a_question_that_one_variant_has_not_answered_counts_for_none(record):
    dense, ours = VARIANTS
    records = [record(seed, dense, 1) for seed in range(4)]
    records += [record(seed, ours, 1) for seed in range(2)]
    assert {row.exact.whole for row in summarise(records, [CELL], VARIANTS, SHAPE)} == {2}


def test_the_last_rows_pool_all_cells(record):
    records = [record(0, v, 1, cell) for v in VARIANTS for cell in (CELL, OTHER)]
    rows = summarise(records, [CELL, OTHER], VARIANTS, SHAPE)
    assert [row.cell for row in rows] == [CELL, CELL, OTHER, OTHER, None, None]
    assert rows[-1].exact.whole == 2


def test_traffic_is_bytes_of_missed_head_blocks_a_sparse_step(record):
    records = [record(s, v, 1) for s in range(2) for v in VARIANTS]
    dense, ours, *_ = summarise(records, [CELL], VARIANTS, SHAPE)
    assert ours.swapped_bytes_per_step == SHAPE.head_block_bytes == 2 * 32 * 64 * 2
    assert ours.hits.value == 0.75
    assert math.isnan(dense.swapped_bytes_per_step)


def test_pages_of_lower_precision_swap_fewer_bytes(record):
    coarse = Variant("sentencekv", 256, "index_share=1.0, host_kv_dtype=int4")
    (row, _) = summarise([record(0, coarse, 1, server=coarse.server)], [CELL], [coarse], SHAPE)
    assert row.swapped_bytes_per_step == SHAPE.head_block_bytes * (4 + 2 * 16 / 64) / 16


def test_bytes_are_unknown_without_the_shape_of_the_kv(record):
    records = [record(0, v, 1) for v in VARIANTS]
    _, ours, *_ = summarise(records, [CELL], VARIANTS)
    assert math.isnan(ours.swapped_bytes_per_step) and math.isnan(ours.index_bytes)


@pytest.mark.parametrize(
    "name,expected",
    [
        (DENSE, 0.0),
        ("streaming", 0.0),
        ("random", 0.0),
        ("sentencekv", 2 * 32 / 8 + 2 + 69 / 32),  # a code and its scale; what a block has
        ("sentencekv-paper", 64 * 2 / 10),  # a mean key for ten tokens
        ("mean key, current", 64 * 2 / 10),
    ],
)
def test_index_bytes_are_those_that_the_ranking_reads(record, name, expected):
    variant = Variant(name)
    (row, _) = summarise([record(0, variant, 1, sentences=400)], [CELL], [variant], SHAPE)
    assert row.index_bytes == pytest.approx(expected)


def test_index_bytes_follow_the_servers_channels():
    variant = Variant("sentencekv", 256, "layer_share=2, index_share=0.25, index_bits=1")
    assert (variant.code_share, variant.code_bits) == (0.25, 1)
    found = SHAPE.index_bytes(variant.index, 10, variant.code_share, variant.code_bits)
    assert found == 16 / 8 + 2 + 69 / 32
    assert Variant("sentencekv", 256).code_share == 0.5


def test_graded_scores_are_averaged(record):
    variant = VARIANTS[1]
    records = [record(seed, variant, seed / 4) for seed in range(5)]
    row, _ = summarise(records, [CELL], [variant], SHAPE)
    assert row.exact.value == 0.5


def test_steps_that_ran_densely_are_pointed_out(record):
    records = [record(0, v, 1) for v in VARIANTS]
    assert "flatter" not in markdown(summarise(records, [CELL], VARIANTS, SHAPE), VARIANTS)
    records[1] = dataclasses.replace(records[1], sparse_steps=5)
    text = markdown(summarise(records, [CELL], VARIANTS, SHAPE), VARIANTS)
    assert f"{CELL}, sentencekv @ 256: sparse in 50.0%" in text


def test_a_row_is_plain_json_whatever_is_missing():
    for row in summarise([], [CELL], VARIANTS, SHAPE):
        told = row.as_dict()
        assert json.loads(json.dumps(told, allow_nan=False)) == told


def test_unknown_coverage_is_left_out_of_the_mean(record):
    some, none = Variant("sentencekv", 256), Variant("quest", 256)
    records = [record(seed, some, 1, coverage=share) for seed, share in enumerate((0.4, None, 0.6))]
    records += [record(seed, none, 1, coverage=None) for seed in range(3)]
    rows = summarise(records, [CELL], [some, none], SHAPE)
    assert rows[0].coverage == pytest.approx(0.5)
    assert math.isnan(rows[1].coverage)
