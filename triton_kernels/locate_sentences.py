# SPDX-License-Identifier: Apache-2.0
"""Where sentences lie: which one holds every 16th token, their spans and their rows."""

import triton
import triton.language as tl
from torch import Tensor

from ..types import SparseBatch

GRANULE = 16  # tokens; divides every block size


@triton.jit
def sentence_span(ends, i, valid):
    """Tokens [start, end) of sentences `i`."""
    start = tl.load(ends + i - 1, mask=valid & (i > 0), other=0)
    return start, tl.load(ends + i, mask=valid, other=0)


@triton.jit
def overlaps(start, end, lo, hi):
    """Whether [start, end) and [lo, hi) share a token."""
    return tl.maximum(start, lo) < tl.minimum(end, hi)


@triton.jit
def sentence_row(row_pages, i, valid, M: tl.constexpr):
    """int64 row of sentences `i` in the centroid and retention pools."""
    page = tl.load(row_pages + i // M, mask=valid, other=0).to(tl.int64)
    return page * M + i % M


@triton.jit(do_not_specialize=["num_granules", "ends_stride", "num_steps"])
def _locate_sentences(
    ends,
    num_sentences,
    first,
    num_granules,
    ends_stride,
    first_stride,
    num_steps,
    GRANULE: tl.constexpr,
    TILE: tl.constexpr,
):
    s = tl.program_id(1)
    c = tl.program_id(0) * TILE + tl.arange(0, TILE)
    ends += s.to(tl.int64) * ends_stride
    token = c * GRANULE
    lo = tl.zeros_like(c)
    hi = lo + tl.load(num_sentences + s)
    for _ in range(num_steps):
        middle = (lo + hi) // 2
        open_ = lo < hi
        right = open_ & (tl.load(ends + middle, mask=open_, other=0) <= token)
        lo = tl.where(right, middle + 1, lo)
        hi = tl.where(open_ & ~right, middle, hi)
    tl.store(first + s.to(tl.int64) * first_stride + c, lo, mask=c < num_granules)


def locate_sentences(batch: SparseBatch, first: Tensor) -> None:
    """Write the sentence that holds token `c * GRANULE`, for every granule c.

    Args:
        first: [>= S, C] int32, written; `num_sentences` where no indexed sentence holds
            the token. C is one more than the granules of the longest request.
    """
    requests, max_sentences = batch.sentence_ends.shape
    tile = 256
    granules = first.shape[1]
    _locate_sentences[(triton.cdiv(granules, tile), requests)](
        batch.sentence_ends,
        batch.num_sentences,
        first,
        granules,
        batch.sentence_ends.stride(0),
        first.stride(0),
        max_sentences.bit_length(),
        GRANULE=GRANULE,
        TILE=tile,
    )
