# SPDX-License-Identifier: Apache-2.0
"""SnapKV: the prompt's last tokens decide once which of its tokens are kept."""

from __future__ import annotations

from ..types import Fate, Settlement
from .base import SelectionPolicy

SNAP_KV = SelectionPolicy(
    name="snapkv",
    index=None,
    grouping="blocks",
    settlement=Settlement(Fate.COMPACT, window=32, kernel=5),
)
"""The tokens that the observation window attends to most, by KV head; the rest is dropped for ever.

Paper: SnapKV (arXiv 2404.14469), Eq. 1 and 2. Parameters as in the authors' code: a window of 32
tokens, mean pooling over 5 neighbours. What is kept is compacted into the request's private blocks
when the first token is decoded; nothing goes to the swap pool and nothing is ranked in decode.

Differences from the paper: votes are averaged over the query heads of a KV head, where the
authors' code keeps a copy of K and V for each query head; sinks and recent window are always kept,
inside the budget; generated tokens stay, as in the paper.
"""
