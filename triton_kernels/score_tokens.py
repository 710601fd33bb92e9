# SPDX-License-Identifier: Apache-2.0
"""Largest token estimate of each sentence, from sign bits.

Token estimates never reach memory: each program reduces its tokens to sentence maxima, and
programs that share a sentence meet in an integer atomic maximum, whose result does not
depend on their order.
"""

import triton
import triton.language as tl

from ..types import Geometry, IndexKind, LayerPools, Reduce, SparseBatch
from .locate_sentences import GRANULE, sentence_span
from .ordered import to_ordered
from .pack_keys import padded_channels, unpack_bits
from .workspace import CHUNK_TOKENS, Workspace

TOKEN_BITS = tl.constexpr(int(IndexKind.TOKEN_BITS))
SOFTMAX_MEAN = tl.constexpr(int(Reduce.SOFTMAX_MEAN))


@triton.jit(do_not_specialize=["pages_stride", "ends_stride"])
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
    byte_rows,
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
    E8: tl.constexpr,
    E8_PAD: tl.constexpr,
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
    byte = tl.arange(0, E8_PAD)
    d = tl.arange(0, E8_PAD * 8)
    level = tl.load(
        levels + (head * G + g[None, :]) * (E8 * 8) + d[:, None],
        mask=(g[None, :] < G) & (d[:, None] < E8 * 8),
        other=0,
    )
    read = byte < E8
    wanted = tl.load(byte_rows + s)
    if wanted < E8:
        # ops.choose_channels: a row's rank is the number of rows before it.
        squares = tl.sum(level.to(tl.int32) * level.to(tl.int32), 1)
        energy = tl.sum(tl.reshape(squares, (E8_PAD, 8)), 1)
        stronger = energy[None, :] > energy[:, None]
        earlier = (energy[None, :] == energy[:, None]) & (byte[None, :] < byte[:, None])
        rank = tl.sum((stronger | earlier).to(tl.int32), 1)
        read = read & (rank < wanted)
        kept = tl.reshape(tl.broadcast_to(read[:, None], (E8_PAD, 8)), (E8_PAD * 8,))
        level = tl.where(kept[:, None], level, 0).to(tl.int8)
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
        column = head_page * (E8 * N) + token % N
        packed = tl.load(
            bits + column[:, None] + byte[None, :] * N,
            mask=valid[:, None] & read[None, :],
            other=0,
        )
        ones = unpack_bits(packed, TILE, E8_PAD * 8)
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
                best + sentence[:, None] * G + g[None, :],
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


def score_tokens(
    geometry: Geometry, pools: LayerPools, batch: SparseBatch, work: Workspace
) -> None:
    """Raise `work.best` to the token estimates of TOKEN_BITS requests.

    `work.partial` gets the maximum and the sum of exponentials of the resident tokens'
    estimates, chunk by chunk, for requests that reduce by SOFTMAX_MEAN.
    """
    heads, group, n = geometry.num_kv_heads, geometry.group_size, geometry.block_size
    max_tokens = batch.pages.shape[1] * n
    requests = len(batch.num_pages)
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
        batch.byte_rows,
        work.best,
        work.partial,
        geometry.scale,
        batch.pages.stride(0),
        batch.sentence_ends.stride(0),
        work.first.stride(0),
        work.best.shape[2],
        work.partial.shape[2],
        H=heads,
        G=group,
        G_PAD=max(8, triton.next_power_of_2(group)),
        E8=geometry.index_dim // 8,
        E8_PAD=padded_channels(geometry.index_dim) // 8,
        N=n,
        GRANULE=GRANULE,
        TILE=128,
        CHUNK=CHUNK_TOKENS,
    )
