# SPDX-License-Identifier: Apache-2.0
"""Ranked fill of the token budget: sentences in, head-blocks out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Geometry, IndexKind, LayerPools, Selection, SparseBatch
from .score_sentences import sentence_rows


def select_blocks(
    geometry: Geometry, pools: LayerPools, batch: SparseBatch, scores: Tensor, mass: Tensor
) -> Selection:
    """Take sentences in descending score until their covers fill the budget.

    A sentence brings the history blocks it touches, in order; blocks that an earlier
    sentence brought are not counted twice, and the last sentence is cut where the budget
    ends. Exactly `budget_blocks` blocks are selected, so shapes do not depend on the data.
    Equal scores: the earlier sentence first. `kept` becomes 1 for the sentences taken (a
    cut one included), 0 for the others. A budget that covers the history takes every block
    and leaves `kept` alone. Requests whose index is TOKEN_CODES are left out, as -1 and NaN.

    Args:
        scores, mass: from `score_sentences`.

    Returns:
        Selection; `coverage` sums the mass of the taken sentences.
    """
    num_requests, heads, _ = scores.shape
    n = geometry.block_size
    k_max = max(1, int(batch.budget_blocks.max()))
    blocks = torch.full((num_requests, heads, k_max), -1, dtype=torch.int32)
    coverage = torch.full((num_requests, heads), float("nan"))
    for s in range(num_requests):
        lo, hi = int(batch.history_lo[s]), int(batch.history_hi[s])
        budget = int(batch.budget_blocks[s])
        if int(batch.index_kind[s]) == IndexKind.TOKEN_CODES:
            continue
        if batch.takes_everything(s):
            blocks[s, :, :budget] = torch.arange(lo, hi, dtype=torch.int32)
            coverage[s] = 1.0
            continue
        ends = batch.sentence_ends[s].tolist()
        rows = sentence_rows(batch, s, geometry.rows_per_page)
        for h in range(heads):
            candidates = [i for i in range(len(rows)) if scores[s, h, i] > float("-inf")]
            candidates.sort(key=lambda i: (-float(scores[s, h, i]), i))
            taken: set[int] = set()
            chosen: list[int] = []
            for i in candidates:
                if len(taken) == budget:
                    break
                first, last = (ends[i - 1] if i else 0) // n, (ends[i] - 1) // n
                for j in range(max(first, lo), min(last, hi - 1) + 1):
                    if len(taken) < budget:
                        taken.add(j)
                chosen.append(i)
            assert len(taken) == budget, "every history block is touched by a sealed sentence"
            blocks[s, h, :budget] = torch.tensor(sorted(taken), dtype=torch.int32)
            if pools.kept is not None:
                pools.kept[rows, h] = 0
                pools.kept[rows[torch.tensor(chosen, dtype=torch.int64)], h] = 1
            coverage[s, h] = mass[s, h, chosen].sum()
    return Selection(blocks, coverage)
