# SPDX-License-Identifier: Apache-2.0
"""The share of attention that a step reads, against a softmax over the whole request."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "worker"))

from small_runtime import (  # noqa: E402
    GROUP,
    HEADS,
    PROMPT_BLOCKS,
    D,
    N,
    make_runtime,
    plan_of,
    turning_sparse,
)

from sentencekv_vllm.evaluation.attention_held import LOOKUP, watching  # noqa: E402

BLOCKS = list(range(2, 2 + PROMPT_BLOCKS))
LENGTH = PROMPT_BLOCKS * N - 3
HI = PROMPT_BLOCKS - 2


def run(sharpness: float, **changes):
    """One step of one request: what was watched, and probabilities of all tokens per layer."""
    runtime = make_runtime(working_set=12)
    caches = [pools.cache.clone() for pools in runtime.pools.layers]
    private = tuple(range(30, 42))
    runtime.apply(turning_sparse(0, tuple(BLOCKS), tuple(range(PROMPT_BLOCKS)), private, **changes))
    plan = plan_of(runtime, [BLOCKS[-1]], [BLOCKS])
    generator = torch.Generator().manual_seed(3)
    found = []
    with watching(runtime, runtime.layout) as held:
        for layer, cache in enumerate(caches):
            query = sharpness * torch.randn(1, HEADS * GROUP, D, generator=generator)
            tables = runtime.rank(plan, layer, query)
            keys = cache[BLOCKS].flatten(2)[..., runtime.layout.keys]  # [n, H, N, D]
            keys = keys.transpose(0, 1).flatten(1, 2)[:, :LENGTH]
            logits = D**-0.5 * query.view(HEADS, GROUP, D) @ keys.mT
            found.append((logits.softmax(-1).mean(1), tables[0] // HEADS, runtime, layer))
    return held, found


def selected(tables, runtime, layer):
    """[H, T] bool: the token is in a block that was read."""
    pools = runtime.pools.layers[layer]
    read = torch.zeros(HEADS, PROMPT_BLOCKS * N, dtype=torch.bool)
    read[:, :N] = read[:, HI * N :] = True
    for h in range(HEADS):
        for block in tables[h, 1:-2].tolist():
            page = int(pools.slot_page[block, h])
            read[h, page * N : (page + 1) * N] = True
    return read[:, :LENGTH]


@pytest.mark.parametrize("sharpness", [1.0, 6.0])
def test_shares_and_lookups_are_those_of_all_tokens(sharpness):
    held, found = run(sharpness)
    share, lookups, hit = 0.0, 0, 0
    for probability, tables, runtime, layer in found:
        read = selected(tables, runtime, layer)
        share += float((probability * read).sum(-1).mean())
        history = torch.zeros_like(read)
        history[:, N : HI * N] = True
        looked_up = (probability > LOOKUP) & history
        lookups += int(looked_up.sum())
        hit += int((looked_up & read).sum())
    assert held.rows == len(found) == len(held.layers)
    assert held.share == pytest.approx(share, abs=1e-4)
    assert (held.lookups, held.found) == (lookups, hit)
    assert sharpness < 2 or lookups > 0


def test_a_budget_that_covers_the_history_reads_everything():
    held, _ = run(6.0, budget_blocks=HI - 1)
    share, estimate, gap, found = held.means()
    assert (share, estimate, found) == pytest.approx((1, 1, 1), abs=1e-5)
    assert gap < 1e-5


def test_the_estimate_is_near_the_truth_and_the_runtime_is_left_as_it_was():
    held, found = run(2.0)
    share, estimate, gap, _ = held.means()
    assert 0 < estimate < 1 and 0 < share < 1
    assert abs(share - estimate) - 1e-9 <= gap < 0.25
    assert "rank" not in vars(found[0][2])
