# SPDX-License-Identifier: Apache-2.0
"""Sentence summaries: one or two vectors over the keys of each sealed sentence."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import IndexKind, LayerPools
from .index_pages import read_keys


def index_sentences(
    pools: LayerPools,
    rows: Tensor,
    spans: Tensor,
    span_blocks: Tensor,
    key_offset: Tensor,
    kind: IndexKind = IndexKind.CENTROID,
) -> None:
    """Write the row of each sentence and clear its retention flag.

    What `centroids` and, where the kind has two vectors, `spreads` hold, channel by channel:
      BOUNDS: smallest and largest key (Quest, arXiv 2406.10774);
      MEAN_STD: mean and variance of the keys;
      others: the mean key (SentenceKV, arXiv 2504.00970, Eq. 1). `spreads` is left alone: it may
        have mean values (`ops.mean_values`).

    Args:
        pools: has rows; `centroids`, `spreads` and `kept` are written; keys are read from `cache`,
            where the blocks of a sentence still are when it is sealed. A kind with two vectors
            needs `spreads`.
        rows: [n] int32, where each sentence's summary goes.
        spans: [n, 2] int32: first token and length, relative to the sentence's first block;
            `0 <= first < N`.
        span_blocks: [n, C] int32: ids of the blocks that the sentence touches, in order;
            entries past its end are ignored (-1).
        key_offset: see `read_keys`.
        kind: of the request whose sentences these are.
    """
    centroids, kept = pools.centroids, pools.kept
    assert centroids is not None and kept is not None, "index_vectors is 1 or 2"
    block_size = pools.cache.shape[-2]
    for row, (first, length), blocks in zip(
        rows.tolist(), spans.tolist(), span_blocks.tolist(), strict=True
    ):
        used = blocks[: (first + length + block_size - 1) // block_size]
        keys = read_keys(pools.cache[torch.tensor(used)], key_offset, block_size)
        tokens = keys.transpose(0, 1).flatten(1, 2)[:, first : first + length].float()  # [H, n, D]
        centroid = tokens.amin(1) if kind == IndexKind.BOUNDS else tokens.mean(1)
        centroids[row] = centroid.to(centroids.dtype)
        if kind.vectors == 2:
            assert pools.spreads is not None, "index_vectors is 2"
            is_bounds = kind == IndexKind.BOUNDS
            spread = tokens.amax(1) if is_bounds else tokens.var(1, correction=0)
            pools.spreads[row] = spread.to(pools.spreads.dtype)
        kept[row] = 0
