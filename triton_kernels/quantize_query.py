# SPDX-License-Identifier: Apache-2.0
"""Rotated queries on a 6-bit grid, so that scores over sign bits are exact integers."""

import triton
import triton.language as tl
from torch import Tensor

from ..ops.quantize_query import QUERY_LEVELS
from .pack_keys import padded_channels

ROWS = 16  # queries a program rotates: the height of a tensor-core tile


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_query(
    query,
    rotation,
    levels,
    steps,
    num_rows,
    D: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    K_STEP: tl.constexpr,
    ROWS: tl.constexpr,
    QUERY_LEVELS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < num_rows
    column = tl.arange(0, E_PAD)[None, :]
    rotated = tl.zeros((ROWS, E_PAD), tl.float32)
    for k in range(0, D, K_STEP):
        channel = k + tl.arange(0, K_STEP)
        x = tl.load(query + row[:, None] * D + channel[None, :], mask=valid[:, None], other=0.0)
        basis = tl.load(rotation + channel[:, None] * E + column, mask=column < E, other=0.0)
        rotated = tl.dot(x.to(tl.float32), basis, rotated, input_precision="tf32x3")
    step = tl.div_rn(tl.max(tl.abs(rotated), 1), QUERY_LEVELS * 1.0)
    inverse = tl.where(step > 0, tl.div_rn(1.0, step), 0.0)
    # Adding 1.5 * 2^23 leaves no fraction bits: round half to even, as torch.round does.
    rounded = (rotated * inverse[:, None] + 12582912.0) - 12582912.0
    tl.store(
        levels + row[:, None] * E + column,
        rounded.to(tl.int8),
        mask=valid[:, None] & (column < E),
    )
    tl.store(steps + row, step, mask=valid)


def quantize_query(query: Tensor, rotation: Tensor, levels: Tensor, steps: Tensor) -> None:
    """`ops.quantize_query` into the caller's buffers.

    Args:
        query: [..., D] contiguous, any float dtype.
        rotation: [D, E] float32.
        levels: [>= rows, E] int8, written.
        steps: [>= rows] float32, written.
    """
    dim = query.shape[-1]
    num_rows = query.numel() // dim
    _quantize_query[(triton.cdiv(num_rows, ROWS),)](
        query,
        rotation,
        levels,
        steps,
        num_rows,
        D=dim,
        E=rotation.shape[1],
        E_PAD=padded_channels(rotation.shape[1]),
        K_STEP=32 if dim % 32 == 0 else 16,
        ROWS=ROWS,
        QUERY_LEVELS=QUERY_LEVELS,
        num_warps=8 if dim > 128 else 4,
    )
