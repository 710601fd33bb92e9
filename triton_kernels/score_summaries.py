# SPDX-License-Identifier: Apache-2.0
"""Products of the queries with the summaries of sentences."""

import triton
import triton.language as tl
from torch import Tensor

from ..ops.score_sentences import BARRED_PRODUCT as BARRED
from ..ops.score_sentences import STD_FACTOR
from ..types import Geometry, IndexKind, LayerPools, SparseBatch
from .locate_sentences import overlaps, sentence_row, sentence_span
from .ordered import to_ordered
from .workspace import Workspace

CENTROID = tl.constexpr(int(IndexKind.CENTROID))
BOUNDS = tl.constexpr(int(IndexKind.BOUNDS))
MEAN_STD = tl.constexpr(int(IndexKind.MEAN_STD))
FACTOR = tl.constexpr(STD_FACTOR)
BARRED_PRODUCT = tl.constexpr(BARRED)
TILE = 64  # sentences a program scores


@triton.jit(do_not_specialize=["row_pages_stride", "ends_stride"])
def _score_summaries(
    centroids,
    spreads,
    query,
    row_pages,
    ends,
    num_sentences,
    history_lo,
    history_hi,
    index_kind,
    best,
    scale,
    row_pages_stride,
    ends_stride,
    max_sentences,
    H: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    K_STEP: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    VECTORS: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    s = tl.program_id(1)
    h = tl.program_id(2)
    count = tl.load(num_sentences + s)
    kind = tl.load(index_kind + s)
    has_spread = (kind == BOUNDS) | (kind == MEAN_STD)
    if tl.program_id(0) * TILE >= count or not (has_spread | (kind == CENTROID)):
        return
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    start, end = sentence_span(ends + s.to(tl.int64) * ends_stride, i, i < count)
    touches = overlaps(start, end, tl.load(history_lo + s) * N, tl.load(history_hi + s) * N)
    paired = touches & (i < tl.where(has_spread, count, 0))
    row = sentence_row(row_pages + s.to(tl.int64) * row_pages_stride, i, touches, M)
    head = s.to(tl.int64) * H + h
    g = tl.arange(0, G_PAD)
    dots = tl.zeros((TILE, G_PAD), tl.float32)
    extra = tl.zeros((TILE, G_PAD), tl.float32)
    for k in range(0, D, K_STEP):
        d = k + tl.arange(0, K_STEP)
        entry = ((row * H + h) * D)[:, None] + d[None, :]
        centroid = tl.load(centroids + entry, mask=touches[:, None], other=0.0).to(tl.float32)
        q = tl.load(
            query + (head * G + g)[None, :] * D + d[:, None], mask=(g < G)[None, :], other=0.0
        ).to(tl.float32)
        if VECTORS == 2:
            spread = tl.load(spreads + entry, mask=paired[:, None], other=0.0).to(tl.float32)
            side = tl.where(kind == BOUNDS, tl.maximum(q, 0.0), q * q)
            q = tl.where(kind == BOUNDS, tl.minimum(q, 0.0), q)
            extra = tl.dot(spread, side, extra, input_precision="tf32x3")  # squares are long
        dots = tl.dot(centroid, q, dots, input_precision=PRECISION)
    if VECTORS == 2:
        deviation = tl.sqrt(tl.where(extra < 0, 0.0, extra))  # what is no number stays so
        dots += tl.where(kind == MEAN_STD, FACTOR * deviation, extra)
    dots = tl.where(dots > BARRED_PRODUCT, tl.minimum(dots, -BARRED_PRODUCT), BARRED_PRODUCT)
    tl.store(
        best + (head * max_sentences + i)[:, None] * G + g[None, :],
        to_ordered(scale * dots),
        mask=touches[:, None] & (g < G)[None, :],
    )


def score_summaries(
    geometry: Geometry, pools: LayerPools, batch: SparseBatch, query: Tensor, work: Workspace
) -> None:
    """Write the logits of CENTROID, BOUNDS and MEAN_STD requests to `work.best`.

    Args:
        query: [S, H * G, D] contiguous, any float dtype.
    """
    requests, max_sentences = batch.sentence_ends.shape
    heads, group = geometry.num_kv_heads, geometry.group_size
    _score_summaries[(triton.cdiv(max_sentences, TILE), requests, heads)](
        pools.centroids,
        pools.centroids if pools.spreads is None else pools.spreads,
        query,
        batch.row_pages,
        batch.sentence_ends,
        batch.num_sentences,
        batch.history_lo,
        batch.history_hi,
        batch.index_kind,
        work.best,
        geometry.scale,
        batch.row_pages.stride(0),
        batch.sentence_ends.stride(0),
        work.best.shape[2],
        H=heads,
        G=group,
        G_PAD=max(8, triton.next_power_of_2(group)),
        D=geometry.head_dim,
        K_STEP=16,
        N=geometry.block_size,
        M=geometry.rows_per_page,
        VECTORS=1 if pools.spreads is None else 2,
        TILE=TILE,
        # Products of 16-bit floats are exact in tf32.
        PRECISION="tf32" if query.element_size() == 2 else "tf32x3",
    )
