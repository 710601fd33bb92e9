# SPDX-License-Identifier: Apache-2.0
"""Sign bits and scales of a tile of keys, inside a kernel (see `ops.pack_keys`)."""

import triton
import triton.language as tl


@triton.jit
def pack_keys(
    keys,
    valid,
    rotation,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    K_STEP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Rotate TILE keys on tensor cores and reduce them.

    Args:
        keys: [TILE, 1] pointers to channel 0 of each key.
        valid: [TILE, 1] bool; other keys are not read.
        rotation: pointer to [D, D] float32.

    Returns:
        bits [TILE, D_PAD / 8] uint8, scales [TILE] float32. Columns past D / 8 are
        meaningless.
    """
    column = tl.arange(0, D_PAD)[None, :]
    rotated = tl.zeros((TILE, D_PAD), tl.float32)
    for k in range(0, D, K_STEP):
        row = k + tl.arange(0, K_STEP)
        x = tl.load(keys + row[None, :], mask=valid, other=0.0).to(tl.float32)
        basis = tl.load(rotation + row[:, None] * D + column, mask=column < D, other=0.0)
        # One tf32 product would move the signs of small channels.
        rotated = tl.dot(x, basis, rotated, input_precision="tf32x3")
    l1 = tl.sum(tl.abs(rotated), 1)
    l2 = tl.sum(rotated * rotated, 1)
    scales = tl.where(l1 > 0, l2 / l1, 0.0)
    signs = tl.reshape((rotated >= 0).to(tl.int32), (TILE, D_PAD // 8, 8))
    bits = tl.sum(signs << tl.arange(0, 8)[None, None, :], 2)
    return bits.to(tl.uint8), scales
