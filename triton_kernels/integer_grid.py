# SPDX-License-Identifier: Apache-2.0
"""Vectors on integer grids, as queries and mean keys are kept (see `ops.quantize_query`).

Launch with `enable_fp_fusion=False`: fused with a product, adding ROUND would round another number.
"""

import triton
import triton.language as tl

from ..ops.pack_keys import SCALE_LIMIT as LIMIT

SCALE_LIMIT = tl.constexpr(LIMIT)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no fraction bits


@triton.jit
def grid_step(x, LEVELS: tl.constexpr):
    """x [rows, D] float32 -> steps [rows]; 0 where a number is not finite, or too large."""
    magnitude = tl.abs(x)
    largest = tl.max(tl.where(magnitude < float("inf"), magnitude, float("inf")), 1)
    step = tl.div_rn(largest, LEVELS * 1.0)
    return tl.where(step < SCALE_LIMIT, step, 0.0)


@triton.jit
def grid_levels(x, step, LEVELS: tl.constexpr):
    """Levels [rows, D] int8 of x, to the nearest, ties to even; 0 where x is not finite."""
    inverse = tl.where(step > 0, tl.div_rn(1.0, tl.where(step > 0, step, 1.0)), 0.0)
    scaled = x * inverse[:, None]
    scaled = tl.where(tl.abs(scaled) < float("inf"), scaled, 0.0)
    rounded = (scaled + ROUND) - ROUND
    return tl.minimum(tl.maximum(rounded, -LEVELS * 1.0), LEVELS * 1.0).to(tl.int8)
