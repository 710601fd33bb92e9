# SPDX-License-Identifier: Apache-2.0
"""Head-blocks at lower precision, tile by tile inside a kernel (see `ops.quantize_pages`).

A program handles runs of 32 elements as [RUNS, 2, 16]: an int4 byte holds an element of either
half. fp8 is made of integers, since GPUs before sm_89 cannot convert it.
"""

import triton
import triton.language as tl

from ..host_format import HostDtype
from ..ops.quantize_pages import SMALLEST as SMALLEST_SPAN

INT4: tl.constexpr = tl.constexpr(int(HostDtype.INT4))
FP8: tl.constexpr = tl.constexpr(int(HostDtype.FP8))
SMALLEST: tl.constexpr = tl.constexpr(SMALLEST_SPAN)
ROUND: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no fraction bits


@triton.jit
def to_fp8(x):
    """e4m3 codes of |x| <= 448, to the nearest, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    small = ((tl.abs(x) * 512.0 + ROUND) - ROUND).to(tl.int32)  # a count of 2^-9
    return ((bits >> 24) & 0x80) | tl.where(magnitude < 0x3C800000, small, normal)


@triton.jit
def from_fp8(code):
    magnitude = code & 0x7F
    small = magnitude.to(tl.float32) * (1.0 / 512.0)
    normal = ((magnitude + 960) << 20).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, small, normal).to(tl.int32, bitcast=True)
    return (value | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def quantize_groups(x, DTYPE: tl.constexpr):
    """x [groups, G] float32 -> codes [groups, G] int32, steps and lows [groups] float32."""
    if DTYPE == FP8:
        lows = tl.zeros_like(tl.max(x, 1))
        largest = tl.max(tl.abs(x), 1)
        binade = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        steps = tl.where(largest > SMALLEST, binade * 0.0078125, 0.0)
        codes = to_fp8(x * inverse(steps)[:, None])
    else:
        levels: tl.constexpr = 15.0 if DTYPE == INT4 else 255.0
        lows = tl.min(x, 1) + 0.0  # no negative zero
        span = tl.max(x, 1) - lows
        exact = tl.div_rn(tl.where(span > SMALLEST, span, 0.0), levels)
        up = (exact.to(tl.int32, bitcast=True) + 0xFFFF) & -65536  # to a bfloat16
        steps = up.to(tl.float32, bitcast=True)
        scaled = (x - lows[:, None]) * inverse(steps)[:, None]
        codes = tl.minimum((scaled + ROUND) - ROUND, levels).to(tl.int32)
    return codes, steps, lows


@triton.jit
def inverse(steps):
    return tl.where(steps > 0, tl.div_rn(1.0, tl.where(steps > 0, steps, 1.0)), 0.0)


@triton.jit
def store_rows(
    head_block, x, row, valid, N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    G: tl.constexpr, DTYPE: tl.constexpr, CACHE_DTYPE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Quantise rows of D elements and write them to stored head-blocks.

    Launch with `enable_fp_fusion=False`: fused with a product, adding ROUND would round another
    number.

    Args:
        head_block: [TILE] uint8 pointers to the head-blocks that the rows belong to.
        x: [TILE, D_PAD] float32.
        row: [TILE] which D elements of the head-block they are.
        valid: [TILE] bool; other rows are not stored.
    """
    per_row: tl.constexpr = D_PAD // G
    groups: tl.constexpr = TILE * per_row
    column = tl.arange(0, per_row)[None, :]
    group = tl.reshape(row[:, None] * (D // G) + column, (groups,))
    valid = tl.reshape(valid[:, None] & (column < D // G), (groups,))
    head_block = tl.reshape(tl.broadcast_to(head_block[:, None], (TILE, per_row)), (groups,))
    codes, steps, lows = quantize_groups(tl.reshape(x, (groups, G)), DTYPE)
    if DTYPE == INT4:
        code_bytes: tl.constexpr = N * D  # of 2 N D elements
        stride: tl.constexpr = G // 2
        halves = tl.reshape(codes, (groups, G // 32, 2, 16))
        packed = tl.sum(halves << (4 * tl.arange(0, 2))[None, None, :, None], 2)
        codes = tl.reshape(packed, (groups, stride))
    else:
        code_bytes: tl.constexpr = 2 * N * D
        stride: tl.constexpr = G
    at = head_block[:, None] + group[:, None] * stride + tl.arange(0, stride)[None, :]
    tl.store(at, codes.to(tl.uint8), mask=valid[:, None])
    step_at = (head_block + code_bytes).to(tl.pointer_type(tl.bfloat16))
    tl.store(step_at + group, steps.to(tl.bfloat16), mask=valid)
    if DTYPE != FP8:
        low_at = (head_block + (code_bytes + 4 * N * D // G)).to(tl.pointer_type(CACHE_DTYPE))
        tl.store(low_at + group, lows.to(CACHE_DTYPE), mask=valid)


@triton.jit
def to_cache_dtype(x, CACHE_DTYPE: tl.constexpr):
    """float32 to the nearest element, ties to even."""
    if CACHE_DTYPE.is_bf16():  # which Triton's interpreter truncates
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(CACHE_DTYPE)


@triton.jit
def load_runs(
    head_block, run, valid, NUMEL: tl.constexpr, G: tl.constexpr, DTYPE: tl.constexpr,
    CACHE_DTYPE: tl.constexpr,
):  # fmt: skip
    """Runs of a stored head-block [RUNS, 2, 16] as they go to the cache, in order.

    Args:
        head_block: its address, a uint8 pointer.
        run: [RUNS] index of each run; the others, where not `valid`, are not read.
    """
    half = tl.arange(0, 2)[None, :, None]
    lane = tl.arange(0, 16)[None, None, :]
    at, read = run[:, None, None], valid[:, None, None]
    group = at // (G // 32)
    if DTYPE == INT4:
        code_bytes: tl.constexpr = NUMEL // 2
        pairs = tl.load(head_block + at * 16 + lane, mask=read, other=0).to(tl.int32)
        codes = (pairs >> (4 * half)) & 15
    else:
        code_bytes: tl.constexpr = NUMEL
        codes = tl.load(head_block + at * 32 + half * 16 + lane, mask=read, other=0).to(tl.int32)
    step_at = (head_block + code_bytes).to(tl.pointer_type(tl.bfloat16))
    steps = tl.load(step_at + group, mask=read, other=0.0).to(tl.float32)
    if DTYPE == FP8:
        return to_cache_dtype(from_fp8(codes) * steps, CACHE_DTYPE)
    low_at = (head_block + (code_bytes + 2 * (NUMEL // G))).to(tl.pointer_type(CACHE_DTYPE))
    lows = tl.load(low_at + group, mask=read, other=0.0).to(tl.float32)
    return to_cache_dtype(lows + codes.to(tl.float32) * steps, CACHE_DTYPE)
