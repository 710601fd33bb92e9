# SPDX-License-Identifier: Apache-2.0
"""The ranking of Quest: pages by the largest product that their bounds allow."""

from __future__ import annotations

from ..types import IndexKind, Reduce
from .base import SelectionPolicy

QUEST = SelectionPolicy(
    name="quest",
    index=IndexKind.BOUNDS,
    reduce=Reduce.MEAN,
    grouping="blocks",
)
"""A block is worth `sum_d max(q_d * min_d, q_d * max_d)` over its keys' channels.

Paper: Quest (arXiv 2406.10774), Eq. 1. Parameters: none of its own; the page size is the block
size. Needs `index_vectors` of 2.

Differences from the paper: one selection per KV head by the mean bound of its query heads, where
the paper ranks for each head (of models without grouped queries); every layer is sparse, where
the paper keeps the first two dense; sinks and recent window are always attended, inside the
budget, and blocks outside the budget live in host memory.
"""
