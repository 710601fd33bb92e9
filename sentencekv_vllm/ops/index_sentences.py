# SPDX-License-Identifier: Apache-2.0
"""Sentence centroids: the mean key of each sealed sentence (arXiv 2504.00970, Eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import LayerPools
from .index_pages import read_keys


def index_sentences(
    pools: LayerPools, rows: Tensor, spans: Tensor, span_blocks: Tensor, key_offset: Tensor
) -> None:
    """Write the centroid of each sentence and clear its retention flag.

    Args:
        pools: `centroids` and `kept` are written; keys are read from `cache`, where the
            blocks of a sentence still are when it is sealed.
        rows: [n] int32, where each sentence's centroid goes.
        spans: [n, 2] int32: first token and length, relative to the sentence's first block;
            `0 <= first < N`.
        span_blocks: [n, C] int32: ids of the blocks that the sentence touches, in order;
            entries past its end are ignored (-1).
        key_offset: see `read_keys`.
    """
    block_size = pools.cache.shape[-2]
    for row, (first, length), blocks in zip(
        rows.tolist(), spans.tolist(), span_blocks.tolist(), strict=True
    ):
        used = blocks[: (first + length + block_size - 1) // block_size]
        keys = read_keys(pools.cache[torch.tensor(used)], key_offset, block_size)
        tokens = keys.transpose(0, 1).flatten(1, 2)[:, first : first + length]  # [H, len, D]
        pools.centroids[row] = tokens.float().mean(1).to(pools.centroids.dtype)
        pools.kept[row] = 0
