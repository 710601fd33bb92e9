# SPDX-License-Identifier: Apache-2.0
"""Sparse paged decode attention with a block table per KV head."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    head_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of one query token per request over the head-blocks in its tables.

    Args:
        query: [S, H * G, D].
        key_cache, value_cache: [B, H, N, D] views, token order.
        head_tables: [S, H, W] int32 of head-block ids `b * H + h`; only the first
            `ceil(seq_lens / N)` entries of a row are read.
        seq_lens: [S] int32: tokens attended to; the last block is filled up to them.
        scale: softmax scale.

    Returns:
        output [S, H * G, D] in the query's dtype; LSE [S, H * G] float32.
    """
    num_requests, num_query_heads, dim = query.shape
    _, heads, n, _ = key_cache.shape
    output = torch.empty_like(query)
    lse = torch.empty(num_requests, num_query_heads, device=query.device)
    for s in range(num_requests):
        length = int(seq_lens[s])
        for h in range(heads):
            ids = head_tables[s, h, : (length + n - 1) // n].long()
            assert bool((ids % heads == h).all()), "a head's table holds its own head-blocks"
            keys = key_cache[ids // heads, h].reshape(-1, dim)[:length].float()
            values = value_cache[ids // heads, h].reshape(-1, dim)[:length].float()
            group = slice(h * num_query_heads // heads, (h + 1) * num_query_heads // heads)
            logits = scale * (query[s, group].float() @ keys.T)
            lse[s, group] = logits.logsumexp(-1)
            output[s, group] = (logits.softmax(-1) @ values).to(query.dtype)
    return output, lse
