# SPDX-License-Identifier: Apache-2.0
"""Gather of missed head-blocks from the swap pool into the working set."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import LayerPools

PROGRAMS = 256  # fixed, whatever is missed; enough reads in flight to fill a PCIe link
PIECE_BYTES = 8192


@triton.jit
def _swap_in(
    host,
    cache,
    misses,
    num_misses,
    cache_block_stride,
    cache_head_stride,
    WORDS: tl.constexpr,
    H: tl.constexpr,
    PIECE: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    pieces: tl.constexpr = (WORDS + PIECE - 1) // PIECE
    for item in range(tl.program_id(0), tl.load(num_misses) * pieces, PROGRAMS):
        miss = misses + item // pieces * 3
        page = tl.load(miss).to(tl.int64)
        head = tl.load(miss + 1).to(tl.int64)
        block = tl.load(miss + 2).to(tl.int64)
        word = (item % pieces) * PIECE + tl.arange(0, PIECE)
        content = tl.load(host + (page * H + head) * WORDS + word, mask=word < WORDS)
        target = cache + block * cache_block_stride + head * cache_head_stride
        tl.store(target + word, content, mask=word < WORDS)


def swap_in(pools: LayerPools, misses: Tensor, num_misses: Tensor) -> None:
    """`ops.swap_in` for the first `num_misses` rows of `misses`.

    Reads pinned host memory through its mapping, so neither the count nor the list visits
    the CPU.

    Args:
        misses: [capacity, 3] int32 rows (page, KV head, block).
        num_misses: [1] int32.
    """
    _, heads, n, width = pools.cache.shape
    assert pools.cache.stride()[2:] == (width, 1), "a head-block is contiguous"
    cache, host = pools.cache.view(torch.int32), pools.host.view(torch.int32)
    _swap_in[(PROGRAMS,)](
        host,
        cache,
        misses,
        num_misses,
        cache.stride(0),
        cache.stride(1),
        WORDS=n * cache.shape[-1],
        H=heads,
        PIECE=PIECE_BYTES // 4,
        PROGRAMS=PROGRAMS,
    )
