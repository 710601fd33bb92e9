# SPDX-License-Identifier: Apache-2.0
"""Whole sentences that the prompt's last tokens look at; the rest is dropped."""

from __future__ import annotations

from ..types import Fate, Settlement
from .base import SelectionPolicy

SENTENCE_KV_ONCE = SelectionPolicy(
    name="sentencekv-once",
    index=None,
    settlement=Settlement(Fate.COMPACT, window=32, kernel=1, unit=None),
)
"""Sentences to which the observation window pays the most attention, by KV head, summed over their
tokens; decided once, the rest is dropped for ever.

Nobody's paper: the unit of SentenceKV (arXiv 2504.00970) with the votes of ChunkKV (2502.00299) and
the memory of SnapKV (2404.14469), for servers without host memory to spare. The last sentence that
the budget has room for is cut.
"""
