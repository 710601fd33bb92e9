# SPDX-License-Identifier: Apache-2.0
"""Copy-out: blocks become host pages with their token index, in one launch."""

import triton
import triton.language as tl
from torch import Tensor

from ..types import LayerPools
from .pack_keys import pack_keys, padded_channels
from .quantize_pages import store_rows

TILE = 64  # tokens a program packs; several pages where blocks are small


@triton.jit(do_not_specialize=["page_slot", "num_tokens"])
def _index_pages(
    cache,
    host,
    bits,
    scales,
    page_slot,
    block_ids,
    page_ids,
    rotation,
    num_tokens,
    cache_block_stride,
    cache_head_stride,
    H: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    K_STEP: tl.constexpr,
    TILE: tl.constexpr,
    HOST_DTYPE: tl.constexpr,
    G: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
):
    h = tl.program_id(1)
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = i < num_tokens
    t = i % N
    block = tl.load(block_ids + i // N, mask=valid, other=0).to(tl.int64)
    page = tl.load(page_ids + i // N, mask=valid, other=0).to(tl.int64)
    head_page = page * H + h

    source = cache + block * cache_block_stride + h.to(tl.int64) * cache_head_stride + t * (2 * D)
    target = host + head_page * HEAD_BLOCK
    channel = tl.arange(0, D_PAD)[None, :]
    copied = valid[:, None] & (channel < D)
    for half in tl.static_range(2):
        offset = half * D + channel
        row = tl.load(source[:, None] + offset, mask=copied)
        if HOST_DTYPE == 0:
            tl.store(target[:, None] + t[:, None] * (2 * D) + offset, row, mask=copied)
        else:
            store_rows(
                target,
                row.to(tl.float32),
                t * 2 + half,
                valid,
                N=N,
                D=D,
                D_PAD=D_PAD,
                G=G,
                DTYPE=HOST_DTYPE,
                CACHE_DTYPE=cache.dtype.element_ty,
                TILE=TILE,
            )

    packed, scale = pack_keys(source[:, None], valid[:, None], rotation, D, E, E_PAD, K_STEP, TILE)
    byte = tl.arange(0, E_PAD // 8)[None, :]
    tl.store(
        bits + (head_page[:, None] * (E // 8) + byte) * N + t[:, None],
        packed,
        mask=valid[:, None] & (byte < E // 8),
    )
    tl.store(scales + head_page * N + t, scale.to(tl.bfloat16), mask=valid)
    tl.store(page_slot + head_page, -1, mask=valid & (t == 0))


def index_pages(pools: LayerPools, block_ids: Tensor, page_ids: Tensor, rotation: Tensor) -> None:
    """`ops.index_pages` for the plain CUDA layout, where the keys are the first D columns.

    Args:
        pools: `host` may be pinned host memory; it is written through its mapping.
        block_ids, page_ids: [n] int32, distinct pages.
        rotation: [D, E] float32 on the device of the cache.
    """
    _, heads, n, width = pools.cache.shape
    dim, form = width // 2, pools.host_format
    assert pools.cache.stride()[2:] == (width, 1), "a head-block is contiguous"
    num_tokens = len(block_ids) * n
    if num_tokens == 0:
        return
    _index_pages[(triton.cdiv(num_tokens, TILE), heads)](
        pools.cache,
        pools.host,
        pools.bits,
        pools.scales,
        pools.page_slot,
        block_ids,
        page_ids,
        rotation,
        num_tokens,
        pools.cache.stride(0),
        pools.cache.stride(1),
        H=heads,
        N=n,
        D=dim,
        D_PAD=triton.next_power_of_2(dim),
        E=rotation.shape[1],
        E_PAD=padded_channels(rotation.shape[1]),
        K_STEP=16,
        TILE=TILE,
        HOST_DTYPE=0 if form is None else int(form.dtype),
        G=0 if form is None else form.group_size,
        HEAD_BLOCK=n * width if form is None else form.head_block_bytes,
        enable_fp_fusion=form is None,  # as `store_rows` asks
        num_warps=8 if dim > 64 else 4,
    )
