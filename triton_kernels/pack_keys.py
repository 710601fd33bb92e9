# SPDX-License-Identifier: Apache-2.0
"""Keys to sign bits and scales and back, tile by tile inside a kernel (see `ops.pack_keys`)."""

import triton
import triton.language as tl


def padded_channels(index_dim: int) -> int:
    """Rotated channels that a kernel works on: a power of two, wide enough for tensor cores."""
    return int(max(32, triton.next_power_of_2(index_dim)))


@triton.jit
def pack_keys(
    keys,
    valid,
    rotation,
    D: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    K_STEP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Rotate TILE keys on tensor cores and reduce them.

    Args:
        keys: [TILE, 1] pointers to channel 0 of each key.
        valid: [TILE, 1] bool; other keys are not read.
        rotation: pointer to [D, E] float32.

    Returns:
        bits [TILE, E_PAD / 8] uint8, scales [TILE] float32. Columns past E / 8 are
        meaningless.
    """
    column = tl.arange(0, E_PAD)[None, :]
    rotated = tl.zeros((TILE, E_PAD), tl.float32)
    l2 = tl.zeros((TILE,), tl.float32)
    for k in range(0, D, K_STEP):
        row = k + tl.arange(0, K_STEP)
        x = tl.load(keys + row[None, :], mask=valid, other=0.0).to(tl.float32)
        basis = tl.load(rotation + row[:, None] * E + column, mask=column < E, other=0.0)
        l2 += tl.sum(x * x, 1)
        # One tf32 product would move the signs of small channels.
        rotated = tl.dot(x, basis, rotated, input_precision="tf32x3")
    l1 = tl.sum(tl.abs(rotated), 1)
    scales = tl.where(l1 > 0, l2 / l1, 0.0)
    signs = tl.reshape((rotated >= 0).to(tl.int32), (TILE, E_PAD // 8, 8))
    bits = tl.sum(signs << tl.arange(0, 8)[None, None, :], 2)
    return bits.to(tl.uint8), scales


@triton.jit
def byte_of(word, i: tl.constexpr):
    return (word >> (8 * i)).to(tl.int8)


@triton.jit
def unpack_bits(packed, TILE: tl.constexpr, E_PAD: tl.constexpr):
    """packed [TILE, E_PAD / 8] uint8 -> bits [TILE, E_PAD] int8, 0 or 1.

    One multiplication spreads a nibble over the four bytes of a word, and joining registers
    leaves the channels of a token adjacent. Shifting along a third dimension takes 720 instead
    of 500 instructions a tile and stores bytes one by one (SASS for sm_90, head_dim 128).
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
    return tl.reshape(tl.join(even, odd), (TILE, E_PAD))
