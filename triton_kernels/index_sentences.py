# SPDX-License-Identifier: Apache-2.0
"""Sentence summaries: one or two vectors over the keys of each sealed sentence."""

import triton
import triton.language as tl
from torch import Tensor

from ..types import IndexKind, LayerPools

TILE = 32  # tokens read at once; sentences are short
BOUNDS = tl.constexpr(int(IndexKind.BOUNDS))
MEAN_STD = tl.constexpr(int(IndexKind.MEAN_STD))


@triton.jit
def span_keys(
    key,
    blocks,
    first,
    length,
    start,
    block_stride,
    channel,
    N: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    """Keys [TILE, D_PAD] of the span's tokens from `start`, and where they are."""
    i_token = start + tl.arange(0, TILE)
    inside = i_token < length
    token = first + i_token
    block = tl.load(blocks + token // N, mask=inside, other=0).to(tl.int64)
    row = key + block * block_stride + (token % N) * (2 * D)
    mask = inside[:, None] & (channel < D)
    return tl.load(row[:, None] + channel, mask=mask, other=0.0).to(tl.float32), mask


@triton.jit(do_not_specialize=["kept", "span_blocks_stride"])
def _index_sentences(
    cache,
    centroids,
    spreads,
    kept,
    rows,
    spans,
    span_blocks,
    cache_block_stride,
    cache_head_stride,
    span_blocks_stride,
    H: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
    KIND: tl.constexpr,
):
    i = tl.program_id(0)
    h = tl.program_id(1)
    first = tl.load(spans + 2 * i)
    length = tl.load(spans + 2 * i + 1)
    channel = tl.arange(0, D_PAD)[None, :]
    blocks = span_blocks + i.to(tl.int64) * span_blocks_stride
    key = cache + h.to(tl.int64) * cache_head_stride
    low = tl.full((TILE, D_PAD), float("inf"), tl.float32)
    high = tl.full((TILE, D_PAD), float("-inf"), tl.float32)
    total = tl.zeros((TILE, D_PAD), tl.float32)
    for start in range(0, length, TILE):
        keys, mask = span_keys(
            key, blocks, first, length, start, cache_block_stride, channel, N, D, TILE
        )
        if KIND == BOUNDS:
            low = tl.minimum(low, tl.where(mask, keys, float("inf")))
            high = tl.maximum(high, tl.where(mask, keys, float("-inf")))
        else:
            total += keys
    entry = tl.load(rows + i).to(tl.int64) * H + h
    target = entry * D + channel
    if KIND == BOUNDS:
        centroid = tl.min(low, 0)[None, :]
        tl.store(spreads + target, tl.max(high, 0)[None, :].to(tl.bfloat16), mask=channel < D)
    else:
        centroid = tl.sum(total, 0)[None, :] / length
    if KIND == MEAN_STD:
        squares = tl.zeros((TILE, D_PAD), tl.float32)
        for start in range(0, length, TILE):
            keys, mask = span_keys(
                key, blocks, first, length, start, cache_block_stride, channel, N, D, TILE
            )
            apart = tl.where(mask, keys - centroid, 0.0)
            squares += apart * apart
        variance = tl.sum(squares, 0)[None, :] / length
        tl.store(spreads + target, variance.to(tl.bfloat16), mask=channel < D)
    tl.store(centroids + target, centroid.to(tl.bfloat16), mask=channel < D)
    tl.store(kept + entry, 0)


def index_sentences(
    pools: LayerPools,
    rows: Tensor,
    spans: Tensor,
    span_blocks: Tensor,
    kind: IndexKind = IndexKind.CENTROID,
) -> None:
    """`ops.index_sentences` for the plain CUDA layout. Arguments as there."""
    _, heads, n, width = pools.cache.shape
    dim = width // 2
    assert pools.cache.stride()[2:] == (width, 1), "a head-block is contiguous"
    assert pools.spreads is not None or kind.vectors < 2, "index_vectors is 2"
    if len(rows) == 0:
        return
    _index_sentences[(len(rows), heads)](
        pools.cache,
        pools.centroids,
        pools.centroids if pools.spreads is None else pools.spreads,
        pools.kept,
        rows,
        spans,
        span_blocks,
        pools.cache.stride(0),
        pools.cache.stride(1),
        span_blocks.stride(0),
        H=heads,
        N=n,
        D=dim,
        D_PAD=triton.next_power_of_2(dim),
        TILE=TILE,
        KIND=int(kind if kind.vectors == 2 else IndexKind.CENTROID),  # few variants
    )
