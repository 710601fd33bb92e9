# SPDX-License-Identifier: Apache-2.0
"""WindowKV: windows of neighbouring tokens are kept whole, the choice is shared by layers."""

from __future__ import annotations

from ..types import Fate, Settlement
from .base import SelectionPolicy

WINDOW_KV = SelectionPolicy(
    name="windowkv",
    index=None,
    grouping="blocks",
    settlement=Settlement(Fate.COMPACT, window=32, kernel=5, unit=16, layer_group=2),
)
"""Windows of 16 tokens with the most votes; every second layer votes for the next one, too.

Paper: WindowKV (arXiv 2503.17922): windows of 8 to 32 tokens, layers in groups that share indices.

Differences from the paper: no classifier of the task, so windows are always kept whole (the
paper's "localisation" tasks); the budget is the same in every layer, where the paper has a
pyramid; a window's score is the sum over its tokens.
"""
