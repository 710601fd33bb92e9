# SPDX-License-Identifier: Apache-2.0
"""Keys to codes and back, tile by tile inside a kernel (see `ops.pack_keys`)."""

import triton
import triton.language as tl

from .integer_grid import SCALE_LIMIT


@triton.jit
def map_keys(
    keys,
    key_map,
    center,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    K_STEP: tl.constexpr,
    TILE: tl.constexpr,
):
    """`key @ key_map - center` on tensor cores.

    Args:
        keys: [TILE, 1] pointers to channel 0 of each key.
        key_map, center: pointers to [D, D] and [D] float32, of the KV head.

    Returns:
        [TILE, D_PAD] float32; 0 past D.
    """
    column = tl.arange(0, D_PAD)[None, :]
    mapped = tl.zeros((TILE, D_PAD), tl.float32)
    for k in range(0, D, K_STEP):
        row = k + tl.arange(0, K_STEP)
        x = tl.load(keys + row[None, :]).to(tl.float32)
        basis = tl.load(key_map + row[:, None] * D + column, mask=column < D, other=0.0)
        # One tf32 product would move the signs of small channels.
        mapped = tl.dot(x, basis, mapped, input_precision="tf32x3")
    return mapped - tl.load(center + column, mask=column < D, other=0.0)


@triton.jit
def pack_bits(ones, TILE: tl.constexpr, D_PAD: tl.constexpr):
    """[TILE, D_PAD] bool -> [TILE, D_PAD / 8] uint8."""
    bits = tl.reshape(ones.to(tl.int32), (TILE, D_PAD // 8, 8))
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@triton.jit
def round_to_bf16(x):
    """The nearest bfloat16, ties to even; Triton's interpreter would truncate."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def code_residuals(
    x, C: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, D_PAD: tl.constexpr
):  # fmt: skip
    """Code what tokens add to the mean of their page.

    Args:
        x: [TILE, D_PAD] float32, of which C channels are coded.

    Returns:
        first and second plane of each channel [TILE, D_PAD / 8] uint8, meaningless past C / 8
        and, the second, with one bit; scales [TILE] bfloat16.
    """
    column = tl.arange(0, D_PAD)[None, :]
    x = tl.where(column < C, x, 0.0)
    negative = x < 0
    squares = x * x
    magnitude = tl.abs(x)
    square = tl.sum(squares, 1)
    product = tl.sum(magnitude, 1)
    first = pack_bits(negative ^ True, TILE, D_PAD)
    second = first
    if BITS == 2:
        outer = squares * C >= square[:, None]
        product += 2 * tl.sum(tl.where(outer, magnitude, 0.0), 1)
        second = pack_bits(negative ^ outer, TILE, D_PAD)
    coded = (product > 0) & (square < float("inf"))
    scales = tl.where(coded, tl.div_rn(square, tl.where(product > 0, product, 1.0)), 0.0)
    return first, second, round_to_bf16(tl.where(scales < SCALE_LIMIT, scales, 0.0))


@triton.jit
def byte_of(word, i: tl.constexpr):
    return (word >> (8 * i)).to(tl.int8)


@triton.jit
def unpack_bits(packed, TILE: tl.constexpr, W_PAD: tl.constexpr):
    """packed [TILE, W_PAD / 8] uint8 -> bits [TILE, W_PAD] int8, 0 or 1.

    One multiplication spreads a nibble over the four bytes of a word, and joining registers
    leaves the planes of a token adjacent. Shifting along a third dimension takes 720 instead
    of 500 instructions a tile and stores bytes one by one (SASS for sm_90, 128 planes).
    """
    word = packed.to(tl.int32)
    low = ((word & 15) * 0x00204081) & 0x01010101
    high = ((word >> 4) * 0x00204081) & 0x01010101
    # join() makes the last dimension: bit 4p + 2q + r lies at [..., p, q, r].
    even = tl.join(
        tl.join(byte_of(low, 0), byte_of(high, 0)), tl.join(byte_of(low, 2), byte_of(high, 2))
    )
    odd = tl.join(
        tl.join(byte_of(low, 1), byte_of(high, 1)), tl.join(byte_of(low, 3), byte_of(high, 3))
    )
    return tl.reshape(tl.join(even, odd), (TILE, W_PAD))
