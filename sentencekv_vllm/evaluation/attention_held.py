# SPDX-License-Identifier: Apache-2.0
"""The true share of attention on what a served decode step reads, beside the index's estimate.

A step attends to sinks, selected blocks and the recent window. The keys of everything else of the
history lie in the swap pool, so the softmax over all of it can be had as well, after the fact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops.estimate_unselected import Attended, attended_lse
from ..ops.token_layout import TokenLayout
from ..types import Geometry, LayerPools, SparseBatch

if TYPE_CHECKING:
    from ..worker.plan import StepPlan
    from ..worker.runtime import Runtime

LOOKUP = 0.2
"""A token of the history is looked up where it has more than this share of a group's attention."""


@dataclass
class Held:
    """Sums over requests, steps and layers."""

    rows: int = 0  # request, step, layer
    share: float = 0.0  # of the attention, mean over heads
    estimate: float = 0.0  # the same, as `coverage` tells it
    gap: float = 0.0  # |share - estimate|
    lookups: int = 0
    found: int = 0  # of them, in a block that was selected
    layers: set[int] = field(default_factory=set)

    def means(self) -> tuple[float, float, float, float]:
        """Share, estimate, mean distance between them, share of lookups found (NaN: none)."""
        rows, lookups = max(self.rows, 1), self.lookups or float("nan")
        return self.share / rows, self.estimate / rows, self.gap / rows, self.found / lookups


@dataclass(frozen=True)
class Truth:
    """Of one request in one layer."""

    share: Tensor  # [H] of the attention on what was read, mean over the group
    lookups: Tensor  # [H] int64
    found: Tensor  # [H] int64


def truth(
    geometry: Geometry,
    pools: LayerPools,
    batch: SparseBatch,
    layout: TokenLayout,
    query: Tensor,
    tables: Tensor,
    seq_lens: Tensor,
) -> list[Truth]:
    """Softmax over all tokens, after the blocks of a layer were selected.

    Args:
        pools: byte copies in the swap pool; `slot_stamp` is of this step where selected.
        query: [S, H * G, D], the query of the attention.
        tables: [S, H, W] int32 and seq_lens: [S] int32, what is attended to.

    Returns:
        One for each request of the batch.
    """
    assert pools.host_format is None, "pages are byte copies"
    heads, group = geometry.num_kv_heads, geometry.group_size
    read = attended_lse(geometry, pools.cache, query, Attended(tables, seq_lens, layout, None))
    head = torch.arange(heads)
    found = []
    for s in range(len(batch.num_pages)):
        lo, hi = int(batch.history_lo[s]), int(batch.history_hi[s])
        pages = batch.pages[s, lo:hi].long()
        keys = pools.host[pages].flatten(2)[..., layout.keys].float()  # [n, H, N, D]
        grouped = query[s].float().view(heads, group, -1)
        logits = geometry.scale * torch.einsum("hgd,nhtd->hgnt", grouped, keys)
        slots = pools.page_slot[pages].long()
        taken = (slots >= 0) & (pools.slot_stamp[slots.clamp(min=0), head] == batch.step)
        taken = taken.t()  # [H, n]
        unread = logits.masked_fill(taken[:, None, :, None], float("-inf"))
        attended = read[s].view(heads, group)
        total = attended.logaddexp(unread.flatten(2).logsumexp(-1))
        probability = (logits - total[..., None, None]).exp().mean(1)  # [H, n, N]
        looked_up = probability > LOOKUP
        found.append(
            Truth(
                (attended - total).exp().mean(1),
                looked_up.sum((1, 2)),
                (looked_up & taken[..., None]).sum((1, 2)),
            )
        )
    return found


@contextmanager
def watching(runtime: Runtime, layout: TokenLayout) -> Iterator[Held]:
    """Sums of every sparse step while the context is open; requests that rank nothing are left
    out. CPU, one query kind: the current one."""
    held, rank = Held(), runtime.rank

    def watched(plan: StepPlan, layer: int, query: Tensor) -> Tensor:
        before = plan.out.coverage.clone()
        tables = rank(plan, layer, query)
        estimates = plan.out.coverage - before
        pools = runtime.pools.layers[layer]
        truths = truth(runtime.geometry, pools, plan.batch, layout, query, tables, plan.seq_lens)
        for s, one in enumerate(truths):
            if plan.unranked[s]:
                continue
            share, estimate = float(one.share.mean()), float(estimates[s])
            held.rows += 1
            held.share += share
            held.estimate += estimate
            held.gap += abs(share - estimate)
            held.lookups += int(one.lookups.sum())
            held.found += int(one.found.sum())
            held.layers.add(layer)
        return tables

    runtime.rank = watched  # type: ignore[method-assign]
    try:
        yield held
    finally:
        del runtime.rank
