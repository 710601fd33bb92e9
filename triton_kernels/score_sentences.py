# SPDX-License-Identifier: Apache-2.0
"""One score per sentence and KV head: logits in parallel, then one reduction per KV head."""

import triton
import triton.language as tl
from torch import Tensor

from ..types import Geometry, IndexKind, LayerPools, Reduce, SparseBatch
from .locate_sentences import overlaps, sentence_row, sentence_span
from .ordered import LOWEST, from_ordered
from .score_summaries import score_summaries
from .workspace import Workspace

TOKEN_CODES = tl.constexpr(int(IndexKind.TOKEN_CODES))
RANDOM = tl.constexpr(int(IndexKind.RANDOM))
SOFTMAX_MEAN = tl.constexpr(int(Reduce.SOFTMAX_MEAN))
MAX = tl.constexpr(int(Reduce.MAX))
EMPTY = tl.constexpr(LOWEST)


@triton.jit
def random_score(seed, step, head, sentence):
    x = (
        seed.to(tl.uint32) * 0x9E3779B1
        + step.to(tl.uint32) * 0x85EBCA77
        + head.to(tl.uint32) * 0xC2B2AE3D
        + sentence.to(tl.uint32) * 0x27D4EB2F
    )
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return (x ^ (x >> 16)).to(tl.float32) * (1.0 / 2**32)


@triton.jit(do_not_specialize=["kept", "row_pages_stride", "ends_stride"])
def _reduce_scores(
    best,
    row_pages,
    kept,
    ends,
    num_sentences,
    history_lo,
    history_hi,
    index_kind,
    reduce,
    retention,
    seeds,
    step,
    scores,
    mass,
    row_pages_stride,
    ends_stride,
    max_sentences,
    H: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    s = tl.program_id(0)
    h = tl.program_id(1)
    kind = tl.load(index_kind + s)
    if kind == TOKEN_CODES:
        return
    mode = tl.load(reduce + s)
    count = tl.load(num_sentences + s)
    lo = tl.load(history_lo + s) * N
    hi = tl.load(history_hi + s) * N
    head = s.to(tl.int64) * H + h
    g = tl.arange(0, G_PAD)[:, None]
    ends += s.to(tl.int64) * ends_stride
    row_pages += s.to(tl.int64) * row_pages_stride
    best += head * G * max_sentences
    scores += head * max_sentences
    mass += head * max_sentences
    bonus = tl.load(retention + s)
    share = (kind != RANDOM) & (mode == SOFTMAX_MEAN)

    top = tl.full((G_PAD, 1), float("-inf"), tl.float32)
    total = tl.zeros((G_PAD, 1), tl.float32)
    if share:
        for begin in range(0, count, TILE):
            i = begin + tl.arange(0, TILE)
            start, end = sentence_span(ends, i, i < count)
            known = overlaps(start, end, lo, hi)[None, :] & (g < G)
            code = tl.load(best + i[None, :] * G + g, mask=known, other=0)
            logits = tl.where(known, from_ordered(code), float("-inf"))
            raised = tl.maximum(top, tl.max(logits, 1)[:, None])
            shift = tl.where(raised > float("-inf"), raised, 0.0)
            total = total * tl.exp(top - shift) + tl.sum(tl.exp(logits - shift), 1)[:, None]
            top = raised
    z = top + tl.log(total)

    for begin in range(0, count, TILE):
        i = begin + tl.arange(0, TILE)
        start, end = sentence_span(ends, i, i < count)
        touches = overlaps(start, end, lo, hi)
        if kind == RANDOM:
            score = random_score(tl.load(seeds + s), tl.load(step), h, i)
        else:
            known = touches[None, :] & (g < G)
            code = tl.load(best + i[None, :] * G + g, mask=known, other=0)
            tl.debug_barrier()  # another thread may empty what this one reads
            tl.store(best + i[None, :] * G + g, EMPTY, mask=known)
            logits = from_ordered(code)
            if mode == SOFTMAX_MEAN:
                logits = tl.where(known, logits - z, float("-inf"))
                largest = tl.max(logits, 0)
                # Relative to the largest: a mean below the smallest float keeps its rank.
                weights = tl.where(known, tl.exp(logits - largest[None, :]), 0.0)
                score = largest + tl.log(tl.sum(weights, 0) / G)
            elif mode == MAX:
                score = tl.max(tl.where(known, logits, float("-inf")), 0)
            else:
                score = tl.sum(tl.where(known, logits, 0.0), 0) / G
        probability = tl.where(touches, tl.exp(score), 0.0)
        tl.store(mass + i, tl.where(share, probability, float("nan")), mask=i < count)
        if HAS_ROWS:
            row = sentence_row(row_pages, i, touches, M)
            flagged = touches & (i < tl.where(kind == RANDOM, 0, count))
            flag = tl.load(kept + row * H + h, mask=flagged, other=0)
            score += bonus * flag.to(tl.float32)
        tl.store(scores + i, tl.where(touches, score, float("-inf")), mask=i < count)


def score_sentences(
    geometry: Geometry, pools: LayerPools, batch: SparseBatch, query: Tensor, work: Workspace
) -> None:
    """`ops.score_sentences` for the rows of kinds other than TOKEN_CODES, from `first` in `work`.

    `work.scores` and `work.mass` are written up to `num_sentences` of these rows; the rest keeps
    what it held.
    """
    if pools.centroids is not None:
        score_summaries(geometry, pools, batch, query, work)
    heads, group = geometry.num_kv_heads, geometry.group_size
    _reduce_scores[(len(batch.num_pages), heads)](
        work.best,
        batch.row_pages,
        work.first if pools.kept is None else pools.kept,
        batch.sentence_ends,
        batch.num_sentences,
        batch.history_lo,
        batch.history_hi,
        batch.index_kind,
        batch.reduce,
        batch.retention,
        batch.seed,
        work.step,
        work.scores,
        work.mass,
        batch.row_pages.stride(0),
        batch.sentence_ends.stride(0),
        work.scores.shape[2],
        H=heads,
        G=group,
        G_PAD=triton.next_power_of_2(group),
        N=geometry.block_size,
        M=geometry.rows_per_page,
        HAS_ROWS=pools.kept is not None,
        TILE=256 if group > 8 else 512,
        num_warps=8,
    )
