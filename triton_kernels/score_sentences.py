# SPDX-License-Identifier: Apache-2.0
"""One score per sentence and KV head: logits in parallel, then one reduction per KV head.

Token estimates never reach memory: each program reduces its tokens to sentence maxima, and
programs that share a sentence meet in an integer atomic maximum, whose result does not
depend on their order.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..ops.score_sentences import IndexKind, Reduce
from ..types import Geometry, LayerPools, SparseBatch
from .locate_sentences import GRANULE
from .ordered import LOWEST, from_ordered, to_ordered
from .workspace import CHUNK_TOKENS, Workspace

TOKEN_BITS = tl.constexpr(int(IndexKind.TOKEN_BITS))
CENTROID = tl.constexpr(int(IndexKind.CENTROID))
RANDOM = tl.constexpr(int(IndexKind.RANDOM))
SOFTMAX_MEAN = tl.constexpr(int(Reduce.SOFTMAX_MEAN))
MAX = tl.constexpr(int(Reduce.MAX))
EMPTY = tl.constexpr(LOWEST)


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


@triton.jit
def _score_tokens(
    bits,
    scales,
    levels,
    steps,
    pages,
    num_pages,
    ends,
    num_sentences,
    first,
    history_lo,
    history_hi,
    index_kind,
    reduce,
    best,
    partial,
    scale,
    pages_stride,
    ends_stride,
    first_stride,
    max_sentences,
    max_chunks,
    H: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    D8: tl.constexpr,
    D8_PAD: tl.constexpr,
    N: tl.constexpr,
    GRANULE: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0)
    s = tl.program_id(1)
    h = tl.program_id(2)
    num_tokens = tl.load(num_pages + s) * N
    if tl.load(index_kind + s) != TOKEN_BITS or chunk * CHUNK >= num_tokens:
        return
    lo = tl.load(history_lo + s) * N
    hi = tl.load(history_hi + s) * N
    count = tl.load(num_sentences + s)
    softmax = tl.load(reduce + s) == SOFTMAX_MEAN
    head = s.to(tl.int64) * H + h
    pages += s.to(tl.int64) * pages_stride
    ends += s.to(tl.int64) * ends_stride
    first += s.to(tl.int64) * first_stride

    g = tl.arange(0, G_PAD)
    byte = tl.arange(0, D8_PAD)
    d = tl.arange(0, D8_PAD * 8)
    level = tl.load(
        levels + (head * G + g[None, :]) * (D8 * 8) + d[:, None],
        mask=(g[None, :] < G) & (d[:, None] < D8 * 8),
        other=0,
    )
    level_sum = tl.sum(level.to(tl.int32), 0)
    unit = scale * tl.load(steps + head * G + g, mask=g < G, other=0.0)
    best += head * G * max_sentences
    top = tl.full((G_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((G_PAD,), tl.float32)

    for begin in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, num_tokens), TILE):
        token = begin + tl.arange(0, TILE)
        valid = token < num_tokens
        page = tl.load(pages + token // N, mask=valid, other=0).to(tl.int64)
        head_page = page * H + h
        column = head_page * (D8 * N) + token % N
        packed = tl.load(
            bits + column[:, None] + byte[None, :] * N,
            mask=valid[:, None] & (byte < D8)[None, :],
            other=0,
        )
        ones = (packed[:, :, None] >> tl.arange(0, 8).to(tl.uint8)[None, None, :]) & 1
        ones = tl.reshape(ones.to(tl.int8), (TILE, D8_PAD * 8))
        # Signs are 2 * bit - 1: one multiplication per token instead of one per channel.
        dots = 2 * tl.dot(ones, level, out_dtype=tl.int32) - level_sum[None, :]
        token_scale = tl.load(scales + head_page * N + token % N, mask=valid, other=0.0)
        logits = unit[None, :] * (dots.to(tl.float32) * token_scale.to(tl.float32)[:, None])

        # Round r takes the r-th sentence of every granule: few rounds, no scan.
        granule = begin // GRANULE + tl.arange(0, TILE // GRANULE)
        known = granule * GRANULE < num_tokens
        sentence = tl.load(first + granule, mask=known, other=0)
        last = tl.load(first + granule + 1, mask=known, other=-1)
        last = tl.minimum(last, count - 1)
        token3 = tl.reshape(token, (TILE // GRANULE, GRANULE))
        logits3 = tl.reshape(logits, (TILE // GRANULE, GRANULE, G_PAD))
        for _ in range(tl.max(last - sentence, 0) + 1):
            start, end = sentence_span(ends, sentence, sentence <= last)
            start, end = tl.maximum(start, lo), tl.minimum(end, hi)
            member = (token3 >= start[:, None]) & (token3 < end[:, None])
            largest = tl.max(tl.where(member[:, :, None], logits3, float("-inf")), 1)
            tl.atomic_max(
                best + g[None, :] * max_sentences + sentence[:, None],
                to_ordered(largest),
                mask=(largest > float("-inf")) & (g < G)[None, :],
                sem="relaxed",
            )
            sentence += 1

        if softmax and (begin < lo or begin + TILE > hi):
            resident = (valid & ((token < lo) | (token >= hi)))[:, None]
            raised = tl.maximum(top, tl.max(tl.where(resident, logits, float("-inf")), 0))
            shift = tl.where(raised > float("-inf"), raised, 0.0)
            weights = tl.where(resident, tl.exp(logits - shift[None, :]), 0.0)
            total = total * tl.exp(top - shift) + tl.sum(weights, 0)
            top = raised

    target = partial + (head * max_chunks + chunk) * 2 * G + g
    tl.store(target, top, mask=g < G)
    tl.store(target + G, total, mask=g < G)


@triton.jit
def _score_centroids(
    centroids,
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
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    s = tl.program_id(1)
    h = tl.program_id(2)
    count = tl.load(num_sentences + s)
    if tl.load(index_kind + s) != CENTROID or tl.program_id(0) * TILE >= count:
        return
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    start, end = sentence_span(ends + s.to(tl.int64) * ends_stride, i, i < count)
    touches = overlaps(start, end, tl.load(history_lo + s) * N, tl.load(history_hi + s) * N)
    row = sentence_row(row_pages + s.to(tl.int64) * row_pages_stride, i, touches, M)
    head = s.to(tl.int64) * H + h
    g = tl.arange(0, G_PAD)
    dots = tl.zeros((TILE, G_PAD), tl.float32)
    for k in range(0, D, K_STEP):
        d = k + tl.arange(0, K_STEP)
        mean = tl.load(
            centroids + ((row * H + h) * D)[:, None] + d[None, :],
            mask=touches[:, None],
            other=0.0,
        )
        q = tl.load(
            query + (head * G + g)[None, :] * D + d[:, None], mask=(g < G)[None, :], other=0.0
        )
        dots = tl.dot(mean.to(tl.float32), q.to(tl.float32), dots, input_precision=PRECISION)
    tl.store(
        best + (head * G + g)[None, :] * max_sentences + i[:, None],
        to_ordered(scale * dots),
        mask=touches[:, None] & (g < G)[None, :],
    )


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


@triton.jit
def _reduce_scores(
    best,
    partial,
    row_pages,
    kept,
    num_pages,
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
    max_chunks,
    H: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    s = tl.program_id(0)
    h = tl.program_id(1)
    kind = tl.load(index_kind + s)
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
    mass += head * (max_sentences + 1)
    bonus = tl.load(retention + s)
    share = (kind != RANDOM) & (mode == SOFTMAX_MEAN)

    top = tl.full((G_PAD, 1), float("-inf"), tl.float32)
    total = tl.zeros((G_PAD, 1), tl.float32)
    resident_top = top
    resident = total
    if share:
        if kind == TOKEN_BITS:
            for chunk in range(tl.cdiv(tl.load(num_pages + s) * N, CHUNK)):
                source = partial + (head * max_chunks + chunk) * 2 * G + g
                chunk_top = tl.load(source, mask=g < G, other=float("-inf"))
                chunk_total = tl.load(source + G, mask=g < G, other=0.0)
                raised = tl.maximum(resident_top, chunk_top)
                shift = tl.where(raised > float("-inf"), raised, 0.0)
                resident = resident * tl.exp(resident_top - shift)
                resident += chunk_total * tl.exp(chunk_top - shift)
                resident_top = raised
            top = resident_top
            total = resident
        for begin in range(0, count, TILE):
            i = begin + tl.arange(0, TILE)
            start, end = sentence_span(ends, i, i < count)
            known = overlaps(start, end, lo, hi)[None, :] & (g < G)
            code = tl.load(best + g * max_sentences + i[None, :], mask=known, other=0)
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
            code = tl.load(best + g * max_sentences + i[None, :], mask=known, other=0)
            tl.store(best + g * max_sentences + i[None, :], EMPTY, mask=known)
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
        if kind != RANDOM:
            row = sentence_row(row_pages, i, touches, M)
            score += bonus * tl.load(kept + row * H + h, mask=touches, other=0).to(tl.float32)
        tl.store(scores + i, tl.where(touches, score, float("-inf")), mask=i < count)

    shares = tl.where(resident > 0, resident * tl.exp(resident_top - z), 0.0)
    resident_mass = tl.sum(tl.where(g < G, shares, 0.0)) / G
    tl.store(mass + max_sentences, tl.where(share, resident_mass, float("nan")))


def score_sentences(
    geometry: Geometry, pools: LayerPools, batch: SparseBatch, query: Tensor, work: Workspace
) -> None:
    """`ops.score_sentences`, from the quantised query and `first` in `work`.

    `work.scores` and `work.mass` are written up to `num_sentences`, and the mass of the
    resident tokens at the last column; other columns keep what they held.
    """
    requests, max_sentences = batch.sentence_ends.shape
    heads, group, n = geometry.num_kv_heads, geometry.group_size, geometry.block_size
    row_sentences, row_chunks = work.scores.shape[2], work.partial.shape[2]
    max_tokens = batch.pages.shape[1] * n
    _score_tokens[(triton.cdiv(max_tokens, CHUNK_TOKENS), requests, heads)](
        pools.bits,
        pools.scales,
        work.levels,
        work.steps,
        batch.pages,
        batch.num_pages,
        batch.sentence_ends,
        batch.num_sentences,
        work.first,
        batch.history_lo,
        batch.history_hi,
        batch.index_kind,
        batch.reduce,
        work.best,
        work.partial,
        geometry.scale,
        batch.pages.stride(0),
        batch.sentence_ends.stride(0),
        work.first.stride(0),
        row_sentences,
        row_chunks,
        H=heads,
        G=group,
        G_PAD=max(8, triton.next_power_of_2(group)),
        D8=geometry.head_dim // 8,
        D8_PAD=triton.next_power_of_2(geometry.head_dim // 8),
        N=n,
        GRANULE=GRANULE,
        TILE=128,
        CHUNK=CHUNK_TOKENS,
    )
    tile = 64
    _score_centroids[(triton.cdiv(max_sentences, tile), requests, heads)](
        pools.centroids,
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
        row_sentences,
        H=heads,
        G=group,
        G_PAD=max(8, triton.next_power_of_2(group)),
        D=geometry.head_dim,
        K_STEP=16,
        N=n,
        M=geometry.rows_per_page,
        TILE=tile,
        # Products of 16-bit floats are exact in tf32.
        PRECISION="tf32" if query.element_size() == 2 else "tf32x3",
    )
    _reduce_scores[(requests, heads)](
        work.best,
        work.partial,
        batch.row_pages,
        pools.kept,
        batch.num_pages,
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
        row_sentences,
        row_chunks,
        H=heads,
        G=group,
        G_PAD=triton.next_power_of_2(group),
        N=n,
        M=geometry.rows_per_page,
        TILE=256 if group > 8 else 512,
        CHUNK=CHUNK_TOKENS,
        num_warps=8,
    )
