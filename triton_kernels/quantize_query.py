# SPDX-License-Identifier: Apache-2.0
"""Mapped queries on two integer grids, so that products with codes and means are exact."""

import triton
import triton.language as tl
from torch import Tensor

from ..ops.quantize_query import CODE_LEVELS, MEAN_LEVELS
from ..types import Basis, Geometry
from .integer_grid import grid_levels, grid_step
from .workspace import Workspace

ROWS = 16  # queries a program maps: the height of a tensor-core tile


@triton.jit(do_not_specialize=["num_requests"])
def _quantize_query(
    query,
    query_map,
    levels,
    steps,
    mean_levels,
    mean_steps,
    num_requests,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    W: tl.constexpr,
    BITS: tl.constexpr,
    K_STEP: tl.constexpr,
    ROWS: tl.constexpr,
    CODE_LEVELS: tl.constexpr,
    MEAN_LEVELS: tl.constexpr,
):
    h = tl.program_id(1)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # of the queries of this KV head
    valid = i < num_requests * G
    row = ((i // G).to(tl.int64) * H + h) * G + i % G
    column = tl.arange(0, D_PAD)[None, :]
    mapped = tl.zeros((ROWS, D_PAD), tl.float32)
    for k in range(0, D, K_STEP):
        channel = k + tl.arange(0, K_STEP)
        x = tl.load(query + row[:, None] * D + channel[None, :], mask=valid[:, None], other=0.0)
        entry = query_map + (h * D + channel[:, None]) * D + column
        basis = tl.load(entry, mask=column < D, other=0.0)
        mapped = tl.dot(x.to(tl.float32), basis, mapped, input_precision="tf32x3")

    step = grid_step(mapped, MEAN_LEVELS)
    level = grid_levels(mapped, step, MEAN_LEVELS)
    tl.store(mean_levels + row[:, None] * D + column, level, mask=valid[:, None] & (column < D))
    tl.store(mean_steps + row, step, mask=valid)

    channels: tl.constexpr = W // BITS
    coded = tl.where(column < channels, mapped, 0.0)
    step = grid_step(coded, CODE_LEVELS)
    level = grid_levels(coded, step, CODE_LEVELS)
    target = levels + row[:, None] * W + column
    written = valid[:, None] & (column < channels)
    if BITS == 2:
        tl.store(target, 2 * level, mask=written)
        tl.store(target + channels, level, mask=written)
    else:
        tl.store(target, level, mask=written)
    tl.store(steps + row, step, mask=valid)


def quantize_query(geometry: Geometry, basis: Basis, query: Tensor, work: Workspace) -> None:
    """`ops.quantize_query` into `work`: levels and steps of both grids.

    Args:
        basis: on the device of the query.
        query: [S, H * G, D] contiguous, any float dtype.
    """
    requests, dim = query.shape[0], query.shape[-1]
    heads, group = geometry.num_kv_heads, geometry.group_size
    _quantize_query[(triton.cdiv(requests * group, ROWS), heads)](
        query,
        basis.query_map,
        work.levels,
        work.steps,
        work.mean_levels,
        work.mean_steps,
        requests,
        H=heads,
        G=group,
        D=dim,
        D_PAD=max(16, triton.next_power_of_2(dim)),
        W=geometry.code_width,
        BITS=basis.bits,
        K_STEP=16,
        ROWS=ROWS,
        CODE_LEVELS=CODE_LEVELS[basis.bits],
        MEAN_LEVELS=MEAN_LEVELS,
        enable_fp_fusion=False,
        num_warps=8 if dim > 128 else 4,
    )
