# SPDX-License-Identifier: Apache-2.0
"""One-bit keys, read only in the channels where the query is strong."""

from __future__ import annotations

from ..types import IndexKind, Reduce
from .base import SelectionPolicy

THINK = SelectionPolicy(
    name="think",
    index=IndexKind.TOKEN_BITS,
    reduce=Reduce.SOFTMAX_MEAN,
    retention=3.0,
    score_channels=0.5,
)
"""The default policy, its estimates summed over half of the rotated channels.

Idea: ThinK (arXiv 2407.21018) finds that few key channels carry the product with a query. For
each KV head and step, the groups of eight channels with the largest `sum of y^2` over the group's
heads are read, the others are not. Parameters: `score_channels`, the share that is read.

Differences from the paper: channels are left out of the ranking only, attention reads whole keys;
they are chosen anew for each query, where the paper prunes once by the queries of an observation
window times the keys; they are channels after a random rotation, which spreads what is
concentrated in few.
"""
