# SPDX-License-Identifier: Apache-2.0
"""Prefill votes: which tokens the last queries of a prompt look at."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from ..types import Settlement


def count_votes(query: Tensor, keys: Tensor, scale: float, settlement: Settlement) -> Tensor:
    """Attention that the window pays to the tokens before it (SnapKV, arXiv 2404.14469, Eq. 1, 2).

    Causal softmax over all tokens for each query head, summed over the window's queries, averaged
    over the group, pooled over `settlement.kernel` neighbours.

    Args:
        query: [W, G, D], of the prompt's last W tokens.
        keys: [T, D] of the group's KV head, all tokens of the prompt.
        scale: softmax scale.

    Returns:
        [T - W] float32.
    """
    window, total = len(query), len(keys)
    logits = scale * torch.einsum("wgd,td->gwt", query.float(), keys.float())
    future = torch.ones(window, window, dtype=torch.bool, device=keys.device).triu(1)
    logits[..., total - window :].masked_fill_(future, float("-inf"))
    attention = logits.softmax(-1)[..., : total - window].sum(1).mean(0)
    padding = settlement.kernel // 2
    if settlement.max_pool:
        return max_pool1d(attention[None], settlement.kernel, 1, padding)[0]
    return avg_pool1d(attention[None], settlement.kernel, 1, padding)[0]


def elect_tokens(scores: Tensor, count: int, group: Tensor | None = None) -> Tensor:
    """The tokens with the most votes, whole groups of neighbours at a time.

    Args:
        scores: [T] of tokens 0 to T - 1.
        count: tokens to keep, at most T. Of the group that goes beyond it the last ones are cut.
        group: [T] int64, ascending from 0: of each token; a group's score is the sum over its
            tokens (ChunkKV, arXiv 2502.00299, Algorithm 1). None: each token is one.

    Returns:
        [count] int64, ascending.
    """
    if group is None:
        return scores.topk(count, sorted=False).indices.sort().values
    sums = torch.zeros_like(scores).index_add_(0, group, scores)  # more than there are: no sync
    rank = sums.argsort(descending=True, stable=True).argsort()
    return rank[group].argsort(stable=True)[:count].sort().values


def retained_means(keys: Tensor, ends: Tensor, retained: Tensor) -> Tensor:
    """Mean of each sentence's retained keys (SentenceKV, arXiv 2504.00970, Eq. 1).

    Args:
        keys: [T, D].
        ends: [s] int64, ascending: sentence i spans tokens [ends[i - 1], ends[i]).
        retained: [K] int64 tokens below `ends[-1]`.

    Returns:
        [s, D] float32; NaN for a sentence without retained tokens.
    """
    sentence = torch.searchsorted(ends, retained, right=True)
    sums = torch.zeros(len(ends), keys.shape[1], device=keys.device)
    sums.index_add_(0, sentence, keys[retained].float())
    return sums / torch.bincount(sentence, minlength=len(ends))[:, None]
