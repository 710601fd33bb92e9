# SPDX-License-Identifier: Apache-2.0
"""Copy-out: blocks become host pages with their codes, in one launch."""

import triton
import triton.language as tl
from torch import Tensor

from ..ops.pack_keys import MEAN_LEVELS
from ..types import LayerPools
from .integer_grid import grid_levels, grid_step
from .pack_keys import code_residuals, map_keys
from .quantize_pages import store_rows

MAX_TILE = 64  # tokens at once, of up to 128 channels: what the registers hold


@triton.jit
def copy_rows(
    source,
    target,
    t,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
    HOST_DTYPE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Tokens `t` [TILE] of a head-block to its page, in the format of the swap pool."""
    channel = tl.arange(0, D_PAD)[None, :]
    copied = (t[:, None] >= 0) & (channel < D)
    for half in tl.static_range(2):
        offset = t[:, None] * (2 * D) + half * D + channel
        row = tl.load(source + offset, mask=copied)
        if HOST_DTYPE == 0:
            tl.store(target + offset, row, mask=copied)
        else:
            store_rows(
                target + tl.zeros_like(t),
                row.to(tl.float32),
                t * 2 + half,
                t >= 0,
                N=N,
                D=D,
                D_PAD=D_PAD,
                G=GROUP,
                DTYPE=HOST_DTYPE,
                CACHE_DTYPE=source.dtype.element_ty,
                TILE=TILE,
            )


@triton.jit(do_not_specialize=["mean_scales", "page_kept", "page_slot"])
def _index_pages(
    cache,
    host,
    codes,
    scales,
    means,
    mean_scales,
    page_kept,
    page_slot,
    key_map,
    center,
    block_ids,
    page_ids,
    cache_block_stride,
    cache_head_stride,
    H: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    W: tl.constexpr,
    BITS: tl.constexpr,
    MEAN_LEVELS: tl.constexpr,
    K_STEP: tl.constexpr,
    TILE: tl.constexpr,
    HOST_DTYPE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
):
    h = tl.program_id(1)
    block = tl.load(block_ids + tl.program_id(0)).to(tl.int64)
    head_page = tl.load(page_ids + tl.program_id(0)).to(tl.int64) * H + h
    source = cache + block * cache_block_stride + h.to(tl.int64) * cache_head_stride
    tl.store(page_slot + head_page, -1)
    for begin in range(0, N, TILE):
        t = begin + tl.arange(0, TILE)
        copy_rows(
            source, host + head_page * HEAD_BLOCK, t, N, D, D_PAD, TILE, HOST_DTYPE, GROUP
        )  # fmt: skip
    if W == 0:
        return

    column = tl.arange(0, D_PAD)
    byte = tl.arange(0, D_PAD // 8)[None, :]
    channels: tl.constexpr = W // BITS
    key_map += h * D * D
    center += h * D
    total = tl.zeros((D_PAD,), tl.float32)
    for begin in range(0, N, TILE):
        keys = source + ((begin + tl.arange(0, TILE)) * (2 * D))[:, None]
        total += tl.sum(map_keys(keys, key_map, center, D, D_PAD, K_STEP, TILE), 0)
    mean = (total / N)[None, :]
    mean_scale = grid_step(mean, MEAN_LEVELS)
    level = grid_levels(mean, mean_scale, MEAN_LEVELS)
    tl.store(means + head_page * D + column[None, :], level, mask=column[None, :] < D)
    tl.store(mean_scales + head_page + tl.zeros_like(tl.arange(0, 1)), mean_scale)
    tl.store(page_kept + head_page, 0)
    coarse = level.to(tl.float32) * mean_scale[:, None]
    for begin in range(0, N, TILE):  # again: a page of many tokens does not fit the registers
        t = begin + tl.arange(0, TILE)
        keys = source + (t * (2 * D))[:, None]
        z = map_keys(keys, key_map, center, D, D_PAD, K_STEP, TILE)
        first, second, scale = code_residuals(z - coarse, channels, BITS, TILE, D_PAD)
        target = codes + (head_page * (W // 8) + byte) * N + t[:, None]
        known = (t[:, None] >= 0) & (byte < channels // 8)
        tl.store(target, first, mask=known)
        if BITS == 2:
            tl.store(target + channels // 8 * N, second, mask=known)
        tl.store(scales + head_page * N + t, scale)


def index_pages(pools: LayerPools, block_ids: Tensor, page_ids: Tensor) -> None:
    """`ops.index_pages` for the plain CUDA layout, where the keys are the first D columns.

    Args:
        pools: `host` may be pinned host memory; it is written through its mapping.
        block_ids, page_ids: [n] int32, distinct pages.
    """
    _, heads, n, width = pools.cache.shape
    dim, form, basis = width // 2, pools.host_format, pools.basis
    assert pools.cache.stride()[2:] == (width, 1), "a head-block is contiguous"
    if len(block_ids) == 0:
        return
    none = pools.page_slot  # stands in for what the server does not keep, and is not touched
    _index_pages[(len(block_ids), heads)](
        pools.cache,
        pools.host,
        none if basis is None else pools.codes,
        none if basis is None else pools.scales,
        none if basis is None else pools.means,
        none if basis is None else pools.mean_scales,
        none if basis is None else pools.page_kept,
        pools.page_slot,
        none if basis is None else basis.key_map,
        none if basis is None else basis.center,
        block_ids,
        page_ids,
        pools.cache.stride(0),
        pools.cache.stride(1),
        H=heads,
        N=n,
        D=dim,
        D_PAD=triton.next_power_of_2(dim),
        W=0 if pools.codes is None else 8 * pools.codes.shape[2],
        BITS=1 if basis is None else basis.bits,
        MEAN_LEVELS=MEAN_LEVELS,
        K_STEP=16,
        TILE=min(MAX_TILE if dim <= 128 else MAX_TILE // 2, n & -n),
        HOST_DTYPE=0 if form is None else int(form.dtype),
        GROUP=0 if form is None else form.group_size,
        HEAD_BLOCK=n * width if form is None else form.head_block_bytes,
        enable_fp_fusion=False,  # as `store_rows` and `integer_grid` ask
        num_warps=8 if dim > 64 else 4,
    )
