# SPDX-License-Identifier: Apache-2.0
"""SentenceKV as published: a pool of voted tokens, ranked by the mean keys of its sentences."""

from __future__ import annotations

from ..types import Fate, IndexKind, QueryKind, Reduce, Settlement
from .base import SelectionPolicy

SENTENCE_KV_POOL = SelectionPolicy(
    name="sentencekv-pool",
    index=IndexKind.CENTROID,
    query=QueryKind.RUNNING_MEAN,
    reduce=Reduce.MEAN,
    retention=0.0,
    opening=3.0,
    settlement=Settlement(Fate.RETAIN, window=32, kernel=7, max_pool=True, factor=3.0),
)
"""Sentences by the product of the running mean query and the mean of their *retained* keys.

Paper: SentenceKV (arXiv 2504.00970), Eq. 1 to 3 and Algorithm 1; window of 32, max-pooling over 7
and factor r = 3 as in the authors' scripts. At the end of the prefill `r * token_budget` tokens are
retained for each KV head; a sentence's bucket is the mean of its retained keys, a sentence without
any is out of the race.

Differences from the paper: a KV head has one selection, by the mean query of its group, where the
authors repeat K and V for each query head; what is moved and attended to are the blocks that a
sentence touches, its tokens that were not retained included; sentences without retained tokens
fill a budget that is not used up; the first token of a sentence attends to r budgets of blocks, as
far as the working set holds them, where the authors' code (`length_threshold` of 1) attends to the
whole pool.
"""
