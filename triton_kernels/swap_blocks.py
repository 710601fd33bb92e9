# SPDX-License-Identifier: Apache-2.0
"""Gather of missed head-blocks from the swap pool into the working set."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import LayerPools
from .quantize_pages import load_runs

PROGRAMS = 256  # fixed, whatever is missed; enough reads in flight to fill a PCIe link
PIECE_BYTES = 8192
PIECE_RUNS = 128  # of 32 elements: 4096, as a piece of bfloat16 copies


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


@triton.jit
def _swap_in_quantized(
    host,
    cache,
    misses,
    num_misses,
    cache_block_stride,
    cache_head_stride,
    NUMEL: tl.constexpr,
    G: tl.constexpr,
    HOST_DTYPE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    H: tl.constexpr,
    PIECE: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    pieces: tl.constexpr = (NUMEL // 32 + PIECE - 1) // PIECE
    for item in range(tl.program_id(0), tl.load(num_misses) * pieces, PROGRAMS):
        miss = misses + item // pieces * 3
        page = tl.load(miss).to(tl.int64)
        head = tl.load(miss + 1).to(tl.int64)
        block = tl.load(miss + 2).to(tl.int64)
        run = (item % pieces) * PIECE + tl.arange(0, PIECE)
        valid = run < NUMEL // 32
        content = load_runs(
            host + (page * H + head) * HEAD_BLOCK,
            run,
            valid,
            NUMEL=NUMEL,
            G=G,
            DTYPE=HOST_DTYPE,
            CACHE_DTYPE=cache.dtype.element_ty,
        )
        element = tl.arange(0, 2)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
        target = cache + block * cache_block_stride + head * cache_head_stride
        tl.store(
            target + run[:, None, None] * 32 + element,
            content,
            mask=valid[:, None, None],
        )


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
    form = pools.host_format
    if form is not None:
        _swap_in_quantized[(PROGRAMS,)](
            pools.host,
            pools.cache,
            misses,
            num_misses,
            pools.cache.stride(0),
            pools.cache.stride(1),
            NUMEL=form.numel,
            G=form.group_size,
            HOST_DTYPE=int(form.dtype),
            HEAD_BLOCK=form.head_block_bytes,
            H=heads,
            PIECE=PIECE_RUNS,
            PROGRAMS=PROGRAMS,
        )
        return
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
