# SPDX-License-Identifier: Apache-2.0
"""From masses to the selected blocks: probabilities in fixed point, and the largest of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..types import Geometry, IndexKind, LayerPools, Selection, SparseBatch
from .score_blocks import UNITS, BlockMasses, exp2_units

WEIGHT_SHIFT = 10  # bits of a weight that are dropped, so that their sum fits 64
PROBABILITY_BITS = 30  # a group's probabilities add up to at most 2 ** 30
FACTOR_CAP = 60.0


def retention_factor(retention: float) -> float:
    """What a block that was selected at the step before has its probability multiplied by."""
    return math.exp(min(retention, FACTOR_CAP))


def probability_shift(group_size: int) -> int:
    """A probability of 1 of one query head is `2 ** probability_shift`."""
    return PROBABILITY_BITS - (group_size - 1).bit_length()


def block_probabilities(masses: BlockMasses, s: int, count: int) -> Tensor:
    """Softmax over the first `count` blocks of request `s`, summed over a group's query heads.

    A head's weights are masses relative to its largest top, `sums * 2 ** -(octaves below)`; a
    probability is the weight times the rounded reciprocal of their sum, rounded down.

    Returns:
        [H, count] int32 in units of `2 ** -probability_shift(G)`.
    """
    tops, sums = masses.tops[s, ..., :count], masses.sums[s, ..., :count]
    if not count:
        return tops.sum(1, dtype=torch.int32)
    below = tops.amax(-1, keepdim=True) - tops
    weights = sums.long() * exp2_units(below % UNITS).long()
    weights = weights >> (WEIGHT_SHIFT + below // UNITS).clamp(max=63)
    total = weights.sum(-1, keepdim=True)  # [H, G, 1], exact
    one = float(2 ** probability_shift(tops.shape[1]))
    reciprocal = torch.tensor(one, dtype=torch.float32) / total.float()
    return (weights.float() * reciprocal).to(torch.int32).sum(1, dtype=torch.int32)


def rank_blocks(
    geometry: Geometry, pools: LayerPools, batch: SparseBatch, masses: BlockMasses
) -> Selection:
    """Select the `budget_blocks` history blocks with the largest scores for each KV head.

    A score is the block's probability, as a float, times `retention` where `page_kept` is set.
    Equal scores: the earlier block first. `page_kept` becomes 1 for the selected blocks, 0 for the
    others of the history. A budget that covers the history takes every block and leaves `page_kept`
    alone. Requests of another index are left out, as -1 and NaN.

    Returns:
        Selection; `coverage` is the probability of what is attended to among all indexed blocks.
    """
    num_requests, heads = len(batch.num_pages), geometry.num_kv_heads
    k_max = max(1, int(batch.budget_blocks.max()))
    blocks = torch.full((num_requests, heads, k_max), -1, dtype=torch.int32)
    coverage = torch.full((num_requests, heads), float("nan"))
    one = float(geometry.group_size * 2 ** probability_shift(geometry.group_size))
    for s in range(num_requests):
        lo, hi = int(batch.history_lo[s]), int(batch.history_hi[s])
        budget, count = int(batch.budget_blocks[s]), int(batch.num_pages[s])
        if int(batch.index_kind[s]) != IndexKind.TOKEN_CODES:
            continue
        if batch.takes_everything(s):
            blocks[s, :, :budget] = torch.arange(lo, hi, dtype=torch.int32)
            coverage[s] = 1.0
            continue
        assert pools.page_kept is not None, "the server keeps codes"
        pages = batch.pages[s, :count].long()
        probability = block_probabilities(masses, s, count)
        history = probability[:, lo:hi]
        kept = pools.page_kept[pages[lo:hi]].t()
        score = torch.where(kept > 0, history.float() * batch.retention[s], history.float())
        chosen = score.argsort(dim=-1, descending=True, stable=True)[:, :budget].sort(-1).values
        blocks[s, :, :budget] = chosen + lo
        flags = torch.zeros_like(history, dtype=torch.uint8).scatter(1, chosen, 1)
        pools.page_kept[pages[lo:hi]] = flags.t()
        taken = history.gather(1, chosen).sum(-1) + probability.sum(-1) - history.sum(-1)
        coverage[s] = taken.float() / one
    return Selection(blocks, coverage)
