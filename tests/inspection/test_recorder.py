# SPDX-License-Identifier: Apache-2.0
"""What is recorded is what the layers attend to, and nothing else changes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "worker"))

sys.path.insert(0, str(Path(__file__).parent))

from random_trace import random_trace  # noqa: E402
from small_runtime import (  # noqa: E402
    BUDGET,
    GROUP,
    HEADS,
    PROMPT_BLOCKS,
    D,
    N,
    make_runtime,
    plan_of,
    rows,
    turning_sparse,
)

from sentencekv_vllm.inspection.recorder import recording  # noqa: E402
from sentencekv_vllm.inspection.trace import ABSENT, MISS  # noqa: E402
from sentencekv_vllm.messages import StepMessage  # noqa: E402

BLOCKS = list(range(2, 2 + PROMPT_BLOCKS))
STEPS, LAYERS = 3, 2
STEP_BYTES = 2 * LAYERS * HEADS * BUDGET


def decode(runtime, rank=None):
    """A few steps of one request: tables of each step and layer, and the pages that they name."""
    generator = torch.Generator().manual_seed(3)
    turn = turning_sparse(0, BLOCKS, tuple(range(PROMPT_BLOCKS)), tuple(range(30, 36)))
    tables, named, counts = [], [], []
    for step in range(1, STEPS + 1):
        message = turn if step == 1 else StepMessage(step, [], [], rows([0], [BLOCKS[-1]]))
        runtime.apply(message)
        plan = plan_of(runtime, [BLOCKS[-1]], [BLOCKS])
        for layer in range(LAYERS):
            query = torch.randn(1, HEADS * GROUP, D, generator=generator)
            found = runtime.rank(plan, layer, query)[0].clone()
            tables.append(found)
            slots = found[:, 1 : 1 + BUDGET].long() // HEADS
            held = runtime.pools.layers[layer].slot_page
            named.append([sorted(held[slots[h], h].tolist()) for h in range(HEADS)])
        counts.append((int(plan.out.hits.sum()), int(plan.out.misses.sum())))
    return tables, named, counts


def test_the_blocks_are_those_of_the_tables_and_hits_those_of_the_counters():
    runtime = make_runtime(working_set=6)
    with recording(runtime) as recorder:
        _, named, counts = decode(runtime)
    trace = recorder.trace()
    assert trace.selected.shape == (STEPS, LAYERS, HEADS, BUDGET)
    assert trace.blocks.reshape(-1, HEADS, BUDGET).tolist() == named
    for t, (hits, misses) in enumerate(counts):
        missed = (trace.selected[t] & MISS).astype(bool).sum()
        assert (trace.selected[t].size - missed, missed) == (hits, misses)
    assert trace.num_misses and trace.num_hits
    assert (trace.lengths == PROMPT_BLOCKS * N - 3).all()
    assert ((trace.estimate > 0) & (trace.estimate < 1)).all()
    assert "rank" not in vars(runtime)


def test_recording_changes_nothing():
    watched, alone = make_runtime(working_set=6), make_runtime(working_set=6)
    with recording(watched):
        tables, *_ = decode(watched)
    for a, b in zip(tables, decode(alone)[0], strict=True):
        assert torch.equal(a, b)


def test_steps_beyond_the_bound_are_counted_and_not_kept():
    runtime = make_runtime(working_set=6)
    with recording(runtime, most_bytes=2 * STEP_BYTES) as recorder:
        decode(runtime)
    trace = recorder.trace()
    assert (len(trace.lengths), trace.left_out) == (2, STEPS - 2)
    assert trace.selected.nbytes == 2 * STEP_BYTES and (trace.selected != ABSENT).all()


def test_several_requests_at_a_time_are_refused():
    runtime = make_runtime(working_set=6)
    turns = [
        turning_sparse(s, [b + 14 * s for b in BLOCKS], tuple(range(14 * s, 14 * s + 14)), private)
        for s, private in enumerate((tuple(range(30, 36)), tuple(range(36, 42))))
    ]
    both = [b + 14 for b in BLOCKS]
    tails = [BLOCKS[-1], both[-1]]
    updates = [u for turn in turns for u in turn.updates]
    runtime.apply(StepMessage(1, [], updates, rows([0, 1], tails)))
    plan = plan_of(runtime, tails, [BLOCKS, both])
    with recording(runtime), pytest.raises(ValueError, match="one request can be recorded"):
        runtime.rank(plan, 0, torch.randn(2, HEADS * GROUP, D))


def test_shares_of_sentences_are_those_of_a_count_by_hand():
    runtime = make_runtime(working_set=6)
    with recording(runtime) as recorder:
        decode(runtime)
    trace = recorder.trace()
    ends = np.array([3, 21, 22, 70, PROMPT_BLOCKS * N - 3], np.int32)
    expected = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        total = 0
        for token in range(start, end):
            total += int((trace.blocks == token // N).any(-1).sum())
        expected.append(total / (end - start) / (STEPS * LAYERS * HEADS))
    assert trace.sentence_shares(ends) == pytest.approx(expected)
    assert max(expected) > 0


def test_steps_after_the_end_of_the_answer_can_be_left_out():
    _, trace = random_trace(prompt=700, steps=5, layers=2, heads=1, width=2)
    kept = trace.before(700 + 4)
    assert kept.lengths.tolist() == [701, 702, 703]
    assert np.array_equal(kept.selected, trace.selected[:3])
    assert np.array_equal(kept.estimate, trace.estimate[:3]) and len(kept.history) == 3
