# SPDX-License-Identifier: Apache-2.0
"""The default policy: sentences as the unit, one-bit keys as the evidence."""

from __future__ import annotations

from ..types import IndexKind, Reduce
from .base import SelectionPolicy

SENTENCE_KV = SelectionPolicy(
    name="sentencekv",
    index=IndexKind.TOKEN_BITS,
    reduce=Reduce.SOFTMAX_MEAN,
    retention=3.0,
)
"""A sentence is worth what its best token is worth.

Idea: SentenceKV (arXiv 2504.00970) selects and moves whole sentences; one-bit codes with an
unbiased scale (RaBitQ, arXiv 2405.12497) estimate query-key products of single tokens. Scores
become probabilities per query head and are averaged over the group, so no head's logits drown
another's.

Parameters: a retention of 3 asks a newcomer to look e^3 = 20 times as important as what it
displaces; it cuts the swap traffic by a third. More cuts more, and loses questions that
ask for several values of one key (docs/results.md).

Differences from the paper: tokens, not the sentence's mean key, are the evidence; the current
token's query, not a running mean; nothing is dropped at prefill.
"""
