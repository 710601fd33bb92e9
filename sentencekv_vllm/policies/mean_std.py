# SPDX-License-Identifier: Apache-2.0
"""Sentences by their mean key, with a bonus for what varies along the query."""

from __future__ import annotations

from ..types import IndexKind, Reduce
from .base import SelectionPolicy

MEAN_STD = SelectionPolicy(
    name="mean-std",
    index=IndexKind.MEAN_STD,
    reduce=Reduce.SOFTMAX_MEAN,
)
"""A sentence is worth `<q, mean> + 2 sqrt(<q^2, variance>)`: a good guess at its best token.

Idea: for keys that vary independently by channel, `<q, k>` has that mean and variance over the
sentence. It repairs what averaging hides, at two vectors a sentence. Parameters: none of its own.
Needs `index_vectors` of 2.

Paper: none; SentenceKV (arXiv 2504.00970) ranks by the first term alone.
"""
