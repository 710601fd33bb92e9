# SPDX-License-Identifier: Apache-2.0
"""Sentence centroids: the mean key of each sealed sentence."""

import triton
import triton.language as tl
from torch import Tensor

from ..types import LayerPools

TILE = 32  # tokens summed at once; sentences are short


@triton.jit
def _index_sentences(
    cache,
    centroids,
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
):
    i = tl.program_id(0)
    h = tl.program_id(1)
    first = tl.load(spans + 2 * i)
    length = tl.load(spans + 2 * i + 1)
    channel = tl.arange(0, D_PAD)[None, :]
    total = tl.zeros((TILE, D_PAD), tl.float32)
    for start in range(0, length, TILE):
        i_token = start + tl.arange(0, TILE)
        inside = i_token < length
        token = first + i_token
        blocks = span_blocks + i.to(tl.int64) * span_blocks_stride
        block = tl.load(blocks + token // N, mask=inside, other=0).to(tl.int64)
        key = cache + block * cache_block_stride + h.to(tl.int64) * cache_head_stride
        key += (token % N) * (2 * D)
        mask = inside[:, None] & (channel < D)
        total += tl.load(key[:, None] + channel, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0)[None, :] / length
    entry = tl.load(rows + i).to(tl.int64) * H + h
    tl.store(centroids + entry * D + channel, mean.to(tl.bfloat16), mask=channel < D)
    tl.store(kept + entry, 0)


def index_sentences(pools: LayerPools, rows: Tensor, spans: Tensor, span_blocks: Tensor) -> None:
    """`ops.index_sentences` for the plain CUDA layout. Arguments as there."""
    _, heads, n, width = pools.cache.shape
    dim = width // 2
    assert pools.cache.stride()[2:] == (width, 1), "a head-block is contiguous"
    if len(rows) == 0:
        return
    _index_sentences[(len(rows), heads)](
        pools.cache,
        pools.centroids,
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
    )
