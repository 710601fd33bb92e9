# SPDX-License-Identifier: Apache-2.0
"""Single tokens in and out of head-blocks, whose inner layout is the backend's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """Where K and V of a token lie in a flattened head-block [N * 2D]."""

    keys: Tensor  # [N, D] int64
    values: Tensor  # [N, D] int64

    @classmethod
    def rows(cls, block_size: int, head_dim: int, device: torch.device) -> TokenLayout:
        """A row [K | V] a token, as the CUDA backends have it."""
        token = torch.arange(block_size, device=device)[:, None] * 2 * head_dim
        keys = token + torch.arange(head_dim, device=device)
        return cls(keys, keys + head_dim)

    @property
    def block_size(self) -> int:
        return len(self.keys)

    @property
    def tokens(self) -> Tensor:
        """[N, 2D]: K and V of each token."""
        return torch.cat((self.keys, self.values), 1)


def read_tokens(cache: Tensor, block_ids: Tensor, tokens: Tensor, layout: TokenLayout) -> Tensor:
    """K and V of chosen tokens of each KV head.

    Args:
        cache: [B, H, N, 2D].
        block_ids: [n] int64: block j holds tokens [j * N, (j + 1) * N).
        tokens: [H, K] int64.

    Returns:
        [H, K, 2D] in the cache's dtype: keys, then values.
    """
    n = layout.block_size
    heads = torch.arange(len(tokens), device=cache.device)[:, None, None]
    blocks = block_ids[tokens // n][..., None]
    return cache.flatten(2)[blocks, heads, layout.tokens[tokens % n]]


def write_tokens(cache: Tensor, block_ids: Tensor, content: Tensor, layout: TokenLayout) -> None:
    """Fill blocks with tokens, in order.

    Args:
        cache: [B, H, N, 2D].
        block_ids: [n] int64, distinct.
        content: [H, n * N, 2D] from `read_tokens`.
    """
    heads, count, _ = content.shape
    n = layout.block_size
    token = torch.arange(count, device=cache.device)
    blocks = block_ids[token // n][None, :, None]
    head = torch.arange(heads, device=cache.device)[:, None, None]
    cache.flatten(2)[blocks, head, layout.tokens[token % n][None]] = content
