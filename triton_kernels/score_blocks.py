# SPDX-License-Identifier: Apache-2.0
"""The mass of every block under the current query, from codes: integers from end to end.

Token estimates never reach memory: a program reduces whole blocks.
"""

import triton
import triton.language as tl

from ..ops import score_blocks as definition
from ..types import Geometry, IndexKind, LayerPools, SparseBatch
from .pack_keys import unpack_bits
from .workspace import CHUNK_TOKENS, Workspace

TOKEN_CODES = tl.constexpr(int(IndexKind.TOKEN_CODES))
UNITS = tl.constexpr(definition.UNITS)
UNIT_LIMIT = tl.constexpr(float(definition.UNIT_LIMIT))
ONE = tl.constexpr(definition.ONE)
NONE = tl.constexpr(definition.NONE)
TILE = 128  # tokens at once, more where a block has more


@triton.jit
def exp2_units(below):
    """As `ops.score_blocks.exp2_units`."""
    part = below & (UNITS - 1)
    return (2847 * part * part - 176300 * part + ONE) >> tl.minimum(below // UNITS, 31)


@triton.jit
def floor_units(x):
    """float32 -> int32 within UNIT_LIMIT."""
    return tl.floor(tl.minimum(tl.maximum(x, -UNIT_LIMIT), UNIT_LIMIT)).to(tl.int32)


@triton.jit
def mean_units(
    means,
    mean_scales,
    mean_level,
    unit,
    head_page,
    valid,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGES: tl.constexpr,
    PAGES_PAD: tl.constexpr,
    G_PAD: tl.constexpr,
):
    """What the mean keys of PAGES pages contribute, [PAGES, G_PAD] int32.

    Args:
        mean_level: [D_PAD, G_PAD] int8.
        unit: [G_PAD] float32.
        head_page: [PAGES_PAD] int64, of which the first PAGES count where `valid`.
    """
    channel = tl.arange(0, D_PAD)[None, :]
    mean = tl.load(
        means + head_page[:, None] * D + channel, mask=valid[:, None] & (channel < D), other=0
    )
    dots = tl.dot(mean, mean_level, out_dtype=tl.int32).to(tl.float32)
    scale = tl.load(mean_scales + head_page, mask=valid, other=0.0)
    units = floor_units((unit[None, :] * scale[:, None]) * dots)
    # The height of a tensor-core tile was needed for the products alone.
    row = tl.arange(0, PAGES_PAD)[None, :, None]
    wanted = row == tl.arange(0, PAGES)[:, None, None]
    return tl.sum(tl.where(wanted, units[None, :, :], 0), 1)


@triton.jit(do_not_specialize=["mean_scales", "pages_stride"])
def _score_blocks(
    codes,
    scales,
    means,
    mean_scales,
    levels,
    steps,
    mean_levels,
    mean_steps,
    pages,
    num_pages,
    index_kind,
    tops,
    sums,
    unit,
    pages_stride,
    max_pages,
    H: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    W: tl.constexpr,
    W_STEP: tl.constexpr,
    N: tl.constexpr,
    N_PAD: tl.constexpr,
    PAGES: tl.constexpr,
    PAGES_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0)
    s = tl.program_id(1)
    h = tl.program_id(2)
    count = tl.load(num_pages + s)
    if tl.load(index_kind + s) != TOKEN_CODES or chunk * CHUNK >= count:
        return
    head = s.to(tl.int64) * H + h
    pages += s.to(tl.int64) * pages_stride
    tops += head * G * max_pages
    sums += head * G * max_pages
    g = tl.arange(0, G_PAD)
    row = head * G + g[None, :]
    channel = tl.arange(0, D_PAD)[:, None]
    mean_level = tl.load(
        mean_levels + row * D + channel, mask=(g[None, :] < G) & (channel < D), other=0
    )
    mean_unit = unit * tl.load(mean_steps + head * G + g, mask=g < G, other=0.0)
    code_unit = unit * tl.load(steps + head * G + g, mask=g < G, other=0.0)

    token = tl.arange(0, PAGES * N_PAD)
    t = token % N_PAD
    for begin in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, count), PAGES):
        block = begin + token // N_PAD
        valid = (block < count) & (t < N)
        page = tl.load(pages + block, mask=valid, other=0).to(tl.int64)
        head_page = page * H + h
        dots = tl.zeros((PAGES * N_PAD, G_PAD), tl.int32)
        for start in tl.static_range(0, W, W_STEP):
            byte = start // 8 + tl.arange(0, W_STEP // 8)[None, :]
            plane = start + tl.arange(0, W_STEP)[:, None]
            level = tl.load(levels + row * W + plane, mask=(g[None, :] < G) & (plane < W), other=0)
            packed = tl.load(
                codes + (head_page[:, None] * (W // 8) + byte) * N + t[:, None],
                mask=valid[:, None] & (byte < W // 8),
                other=0,
            )
            ones = unpack_bits(packed, PAGES * N_PAD, W_STEP)
            # Signs are 2 * bit - 1: one multiplication per token instead of one per plane.
            dots += 2 * tl.dot(ones, level, out_dtype=tl.int32)
            dots -= tl.sum(level.to(tl.int32), 0)[None, :]
        scale = tl.load(scales + head_page * N + t, mask=valid, other=0.0).to(tl.float32)
        fine = floor_units((code_unit[None, :] * scale[:, None]) * dots.to(tl.float32))

        i = tl.arange(0, PAGES_PAD)
        known = (i < PAGES) & (begin + i < count)
        head_page = tl.load(pages + begin + i, mask=known, other=0).to(tl.int64) * H + h
        coarse = mean_units(
            means, mean_scales, mean_level, mean_unit, head_page, known,
            D, D_PAD, PAGES, PAGES_PAD, G_PAD,
        )  # fmt: skip
        units = coarse[:, None, :] + tl.reshape(fine, (PAGES, N_PAD, G_PAD))
        inside = tl.reshape(valid, (PAGES, N_PAD))[:, :, None]
        units = tl.where(inside, units, NONE)
        top = tl.max(units, 1)
        masses = tl.where(inside, exp2_units(top[:, None, :] - units), 0)
        block = begin + tl.arange(0, PAGES)[:, None]
        target = g[None, :].to(tl.int64) * max_pages + block
        written = (block < count) & (g[None, :] < G)
        tl.store(tops + target, top, mask=written)
        tl.store(sums + target, tl.sum(masses, 1), mask=written)


def score_blocks(
    geometry: Geometry, pools: LayerPools, batch: SparseBatch, work: Workspace
) -> None:
    """`ops.score_blocks`, from the quantised query in `work`.

    `work.tops` and `work.sums` are written up to `num_pages` of TOKEN_CODES requests.
    """
    heads, group, n = geometry.num_kv_heads, geometry.group_size, geometry.block_size
    dim, width = geometry.head_dim, geometry.code_width
    padded = triton.next_power_of_2(n)
    pages = max(1, TILE // padded)
    requests, max_pages = batch.pages.shape
    chunk = max(1, CHUNK_TOKENS // padded)
    _score_blocks[(triton.cdiv(max_pages, chunk), requests, heads)](
        pools.codes,
        pools.scales,
        pools.means,
        pools.mean_scales,
        work.levels,
        work.steps,
        work.mean_levels,
        work.mean_steps,
        batch.pages,
        batch.num_pages,
        batch.index_kind,
        work.tops,
        work.sums,
        definition.unit_factor(geometry.scale),
        batch.pages.stride(0),
        work.tops.shape[3],
        H=heads,
        G=group,
        G_PAD=max(8, triton.next_power_of_2(group)),
        D=dim,
        D_PAD=max(32, triton.next_power_of_2(dim)),  # wide enough for tensor cores
        W=width,
        W_STEP=min(128, max(32, triton.next_power_of_2(width))),
        N=n,
        N_PAD=padded,
        PAGES=pages,
        PAGES_PAD=max(16, pages),
        CHUNK=chunk,
        enable_fp_fusion=False,
        num_warps=4 * max(1, padded // TILE),
    )
