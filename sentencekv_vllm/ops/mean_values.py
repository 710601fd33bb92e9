# SPDX-License-Identifier: Apache-2.0
"""Mean values of groups, beside their mean keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import LayerPools
from .token_layout import TokenLayout


@dataclass(frozen=True)
class GroupTokens:
    """The tokens of n groups, group after group."""

    blocks: Tensor  # [T] int64: block of `cache` that a token is in
    places: Tensor  # [T] int64: its place there, below N
    lengths: Tensor  # [n] int64: tokens of each group; they sum to T


def write_mean_values(
    pools: LayerPools, rows: Tensor, tokens: GroupTokens, layout: TokenLayout
) -> None:
    """Write the mean value of each group to its row of `spreads`.

    The same code on every platform: groups are sealed once, and no decode step waits for it.

    Args:
        pools: `spreads` is written; values are read from `cache`.
        rows: [n] int32.
        tokens: of these groups.
        layout: of a head-block.
    """
    assert pools.spreads is not None, "index_vectors is 2"
    blocks = pools.cache.flatten(2)  # [B, H, N * 2D]
    heads = torch.arange(blocks.shape[1], device=blocks.device)[:, None]
    values = blocks[tokens.blocks[:, None, None], heads, layout.values[tokens.places][:, None]]
    # Sums in the order of the tokens, so that equal pages give equal rows. `unsafe` skips checks
    # of the lengths, for which the host would wait.
    means = torch.segment_reduce(values.float(), "mean", lengths=tokens.lengths, unsafe=True)
    pools.spreads.index_copy_(0, rows.long(), means.to(pools.spreads.dtype))
