# SPDX-License-Identifier: Apache-2.0
"""A working set that is filled ahead changes when head-blocks are swapped in, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_runtime import (
    BUDGET,
    GROUP,
    HEADS,
    PROMPT_BLOCKS,
    WINDOW,
    D,
    attend,
    make_runtime,
    plan_of,
    rows,
    turning_sparse,
)

from sentencekv_vllm.messages import StepMessage
from sentencekv_vllm.ops.layer_ops import ReferenceOps
from sentencekv_vllm.worker.observations import Observed

LAYERS, SLOT, PLACE = 2, 1, WINDOW - 1
FILLED = LAYERS * HEADS * BUDGET


def decode(working_set, warm, layer_share=1, last_query=PLACE, drift=0.1, steps=5):
    """Outputs, flags and (hits, misses) of each step, and the counters."""
    runtime = make_runtime(working_set, layer_share, warm_ops=ReferenceOps() if warm else None)
    generator = torch.Generator().manual_seed(4)
    queries = 3 * torch.randn(LAYERS, 1, HEADS * GROUP, D, generator=generator)
    at = Observed(torch.zeros(1, dtype=torch.int64), torch.tensor([SLOT * WINDOW + PLACE]))
    for layer in range(LAYERS):
        runtime.observations.put(layer, queries[layer], at)
    blocks, private = [*range(1, PROMPT_BLOCKS + 1)], [*range(20, 20 + working_set)]
    outputs, flags, lookups = [], [], []
    for step in range(1, steps + 1):
        message = turning_sparse(SLOT, blocks, [*range(30, 44)], private)
        if step == 1:
            (update,) = message.updates
            message = replace(message, updates=[replace(update, last_query=last_query)])
        else:
            message = StepMessage(step, sparse=rows([SLOT], [PROMPT_BLOCKS]))
        runtime.apply(message)
        plan = plan_of(runtime, [PROMPT_BLOCKS], [blocks])
        for layer in range(LAYERS):
            queries[layer] += drift * torch.randn(queries[layer].shape, generator=generator)
            outputs.append(attend(runtime, plan, layer, queries[layer]))
        flags.append(runtime.pools.page_kept.clone())
        report = runtime.take_report()
        lookups.append((int(report.hits[0]), int(report.misses[0])))
    return torch.stack(outputs), torch.stack(flags), lookups, runtime.take_counters()


@pytest.mark.parametrize("layer_share", [1, 2])
@pytest.mark.parametrize("working_set", [BUDGET, 2 * BUDGET])
@pytest.mark.parametrize("drift", [0.1, 9.0])
def test_outputs_and_flags_are_the_same_and_only_hits_differ(working_set, layer_share, drift):
    cold = decode(working_set, False, layer_share, drift=drift)
    warm = decode(working_set, True, layer_share, drift=drift)
    assert torch.equal(cold[0], warm[0]) and torch.equal(cold[1], warm[1])
    assert warm[1].any(), "retention is at work"
    assert [sum(step) for step in cold[2]] == [sum(step) for step in warm[2]]
    assert cold[2][0] == (0, FILLED)
    if drift < 1:
        assert warm[2][0][1] < FILLED / 3, "most of the first selection is resident"
    else:
        assert warm[2][0][1] > 0, "wrong guesses make room, also where the working set is full"


def test_what_was_filled_is_counted_apart():
    counted = decode(BUDGET, True, drift=9.0)[3]
    assert counted["warm_start_head_blocks"] == FILLED
    swapped = counted["misses"] + FILLED
    assert counted["swap_in_bytes"] == swapped * make_runtime(BUDGET).pools.head_block_bytes
    assert "warm_start_head_blocks" not in decode(BUDGET, False)[3]


def test_a_request_whose_last_query_was_not_kept_starts_cold():
    cold, unknown = decode(BUDGET, False), decode(BUDGET, True, last_query=-1)
    assert unknown[2] == cold[2] and "warm_start_head_blocks" not in unknown[3]
