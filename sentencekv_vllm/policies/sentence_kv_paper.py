# SPDX-License-Identifier: Apache-2.0
"""The ranking of the SentenceKV paper."""

from __future__ import annotations

from ..types import IndexKind, QueryKind, Reduce
from .base import SelectionPolicy

SENTENCE_KV_PAPER = SelectionPolicy(
    name="sentencekv-paper",
    index=IndexKind.CENTROID,
    query=QueryKind.RUNNING_MEAN,
    reduce=Reduce.MEAN,
)
"""A sentence is worth the product of its mean key and the mean query of the open sentence.

Paper: SentenceKV (arXiv 2504.00970), Eq. 1 to 3. Parameters: none of its own.

Differences from the paper: the whole history can be recalled, where the paper keeps only the
prompt tokens that an observation window votes for; the budget is counted in blocks.
"""
