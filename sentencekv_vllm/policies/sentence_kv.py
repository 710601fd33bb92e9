# SPDX-License-Identifier: Apache-2.0
"""The default policy: blocks by the estimated mass of their tokens."""

from __future__ import annotations

from ..types import IndexKind, Reduce
from .base import SelectionPolicy

SENTENCE_KV = SelectionPolicy(
    name="sentencekv",
    index=IndexKind.TOKEN_CODES,
    reduce=Reduce.SOFTMAX_MEAN,
    grouping="blocks",
    retention=2.0,
)
"""A block is worth the attention that its tokens would get, summed up.

Idea: a token's logit is estimated as `query . mean key of its block + query . code of what the
token adds to it`. The mean takes away what all keys of a model have in common (biases, a few wide
channels), which is most of a real key and tells little about which one; two bits of the channels
that the model's own moments show to matter tell the rest (codes of residuals to centroids: RaBitQ,
arXiv 2405.12497; transform coding for the bits). Estimates become probabilities per query head,
which are summed over a block and averaged over the group, so no head's logits drown another's.

Parameters: a retention of 2 asks a newcomer to look e^2 = 7 times as important as what it
displaces; some 94 % of the blocks then stay from step to step.

Differences from SentenceKV (arXiv 2504.00970): the unit that is ranked and moved is the KV block
and its centroid, not the sentence and its own: a budget is spent on nothing else than what is
looked at, and an index entry is a function of one page. Tokens, not mean keys alone, are the
evidence; the current token's query, not a running mean; nothing is dropped at prefill. Sentences
are what `sentencekv-paper`, `sentencekv-pool` and `sentencekv-once` rank.
"""
