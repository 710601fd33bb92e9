# SPDX-License-Identifier: Apache-2.0
"""Rotated queries on a 6-bit grid, so that scores over sign bits are exact integers.

A Hadamard rotation is sums and differences, in the order of csrc/cpu/rotate.hpp and
csrc/include/sentencekv/quantize_query.cuh: all three round alike, and levels are the same.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..ops.quantize_query import QUERY_LEVELS
from ..ops.rotation import is_hadamard
from .pack_keys import padded_channels

ROWS = 16  # queries a program rotates: the height of a tensor-core tile
HADAMARD_ROWS = 4


@triton.jit
def rotate_hadamard(x, ROWS: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr):
    """Sums and differences of channels that differ in one bit, from the lowest bit up."""
    for stage in tl.static_range(STAGES):
        pairs = tl.reshape(x, (ROWS, D >> (stage + 1), 2, 1 << stage))
        low, high = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        pairs = tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2))
        x = tl.reshape(pairs, (ROWS, D))
    return x


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
    STAGES: tl.constexpr,
    QUERY_LEVELS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < num_rows
    column = tl.arange(0, E_PAD)[None, :]
    if STAGES:
        channel = tl.arange(0, D)
        x = tl.load(query + row[:, None] * D + channel[None, :], mask=valid[:, None], other=0.0)
        signs = tl.load(rotation + channel * E)  # times 1 / sqrt(D); this column has no others
        rotated = rotate_hadamard(x.to(tl.float32) * signs[None, :], ROWS, D, STAGES)
        rotated = tl.where(column < E, rotated, 0.0)
    else:
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
        rotation: [D, E] float32, that of `ops.rotation`.
        levels: [>= rows, E] int8, written.
        steps: [>= rows] float32, written.
    """
    dim = query.shape[-1]
    num_rows = query.numel() // dim
    hadamard = is_hadamard(dim)
    rows = HADAMARD_ROWS if hadamard else ROWS
    _quantize_query[(triton.cdiv(num_rows, rows),)](
        query,
        rotation,
        levels,
        steps,
        num_rows,
        D=dim,
        E=rotation.shape[1],
        E_PAD=dim if hadamard else padded_channels(rotation.shape[1]),
        K_STEP=16,
        ROWS=rows,
        STAGES=dim.bit_length() - 1 if hadamard else 0,
        QUERY_LEVELS=QUERY_LEVELS,
        enable_fp_fusion=not hadamard,  # the three round alike
        num_warps=8 if dim > 128 and not hadamard else 4,
    )
