# SPDX-License-Identifier: Apache-2.0
"""From masses to the selected blocks: probabilities in fixed point, and the largest of them."""

import triton
import triton.language as tl

from ..ops import rank_blocks as definition
from ..types import Geometry, IndexKind, LayerPools, SparseBatch
from .score_blocks import NONE, UNITS, exp2_units
from .take_largest import count_above, last_key, load_keys, take
from .workspace import Workspace

TOKEN_CODES = tl.constexpr(int(IndexKind.TOKEN_CODES))
WEIGHT_SHIFT = tl.constexpr(definition.WEIGHT_SHIFT)
TILE = 2048  # blocks at once
ELEMENTS = 4096  # of tops at once


@triton.jit
def load_weights(tops, sums, top, g, b, count, max_pages, G: tl.constexpr):
    """Masses relative to each head's largest top, [G_PAD, TILE] int64."""
    at = g.to(tl.int64) * max_pages + b
    known = (g < G) & (b < count)
    below = top - tl.load(tops + at, mask=known, other=NONE)
    mass = tl.load(sums + at, mask=known, other=0).to(tl.int64)
    part = exp2_units(below & (UNITS - 1)).to(tl.int64)
    weight = (mass * part) >> tl.minimum(below // UNITS + WEIGHT_SHIFT, 63).to(tl.int64)
    return tl.where(known, weight, 0)


@triton.jit
def write_probabilities(
    tops, sums, shares, count, max_pages, one,
    G: tl.constexpr, G_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`ops.rank_blocks.block_probabilities` of a KV head to `shares`; their sum."""
    g = tl.arange(0, G_PAD)[:, None]
    largest = tl.full((G_PAD, TILE), NONE, tl.int32)
    for begin in range(0, count, TILE):
        b = begin + tl.arange(0, TILE)[None, :]
        at = g.to(tl.int64) * max_pages + b
        found = tl.load(tops + at, mask=(g < G) & (b < count), other=NONE)
        largest = tl.maximum(largest, found)
    top = tl.max(largest, 1)[:, None]
    total = tl.zeros((G_PAD, TILE), tl.int64)
    for begin in range(0, count, TILE):
        b = begin + tl.arange(0, TILE)[None, :]
        total += load_weights(tops, sums, top, g, b, count, max_pages, G)
    whole = tl.sum(total, 1)[:, None].to(tl.float32)
    reciprocal = tl.where(whole > 0, tl.div_rn(one, tl.where(whole > 0, whole, 1.0)), 0.0)
    added = tl.zeros((TILE,), tl.int32)
    for begin in range(0, count, TILE):
        b = begin + tl.arange(0, TILE)
        weight = load_weights(tops, sums, top, g, b[None, :], count, max_pages, G)
        share = tl.sum((weight.to(tl.float32) * reciprocal).to(tl.int32), 0)
        tl.store(shares + b, share, mask=b < count)
        added += share
    return tl.sum(added, 0)


@triton.jit(do_not_specialize=["page_kept", "pages_stride"])
def _rank_blocks(
    tops,
    sums,
    pages,
    page_kept,
    num_pages,
    history_lo,
    history_hi,
    budget_blocks,
    index_kind,
    retention,
    shares,
    keys,
    blocks,
    coverage,
    one,
    pages_stride,
    max_pages,
    max_selected,
    H: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    s = tl.program_id(0)
    h = tl.program_id(1)
    if tl.load(index_kind + s) != TOKEN_CODES:
        return
    head = s.to(tl.int64) * H + h
    lo = tl.load(history_lo + s)
    hi = tl.load(history_hi + s)
    budget = tl.load(budget_blocks + s)
    blocks += head * max_selected
    order = tl.arange(0, K_PAD)
    if budget == hi - lo:
        tl.store(
            blocks + order, tl.where(order < budget, lo + order, -1), mask=order < max_selected
        )
        tl.store(coverage + head, 1.0)
        return
    tl.store(blocks + order, -1, mask=(order >= budget) & (order < max_selected))

    pages += s.to(tl.int64) * pages_stride
    shares += head * max_pages
    keys += head * max_pages
    total = write_probabilities(
        tops + head * G * max_pages, sums + head * G * max_pages, shares,
        tl.load(num_pages + s), max_pages, one, G, G_PAD, GROUP_TILE,
    )  # fmt: skip
    tl.debug_barrier()
    factor = tl.load(retention + s)
    history = tl.zeros((TILE,), tl.int32)
    for begin in range(lo, hi, TILE):
        b = begin + tl.arange(0, TILE)
        page = tl.load(pages + b, mask=b < hi, other=0).to(tl.int64)
        kept = tl.load(page_kept + page * H + h, mask=b < hi, other=0)
        share = tl.load(shares + b, mask=b < hi, other=0)
        history += share
        score = tl.where(kept > 0, share.to(tl.float32) * factor, share.to(tl.float32))
        # Floats that are not negative have the order of their bits.
        tl.store(keys + b, score.to(tl.int32, bitcast=True), mask=b < hi)
    tl.debug_barrier()
    attended = tl.zeros((TILE,), tl.int32)
    threshold = last_key(keys, lo, hi, budget, TILE)
    ties = budget - count_above(keys, lo, hi, threshold, TILE)
    position = tl.zeros((), tl.int32)
    for begin in range(lo, hi, TILE):
        b = begin + tl.arange(0, TILE)
        key = load_keys(keys, b, b < hi)
        chosen, place, ties, position = take(key, b < hi, threshold, ties, position)
        tl.store(blocks + place, b, mask=chosen)
        page = tl.load(pages + b, mask=b < hi, other=0).to(tl.int64)
        tl.store(page_kept + page * H + h, chosen.to(tl.uint8), mask=b < hi)
        attended += tl.load(shares + b, mask=chosen, other=0)
    share = total - tl.sum(history, 0) + tl.sum(attended, 0)
    tl.store(coverage + head, tl.div_rn(share.to(tl.float32), one * G))


def rank_blocks(geometry: Geometry, pools: LayerPools, batch: SparseBatch, work: Workspace) -> None:
    """`ops.rank_blocks`, from `tops` and `sums` to `blocks` and `coverage` of `work`.

    Rows of another index keep what they hold. `shares` and `keys` are scratch memory.
    """
    group = geometry.group_size
    padded = triton.next_power_of_2(group)
    _rank_blocks[(len(batch.num_pages), geometry.num_kv_heads)](
        work.tops,
        work.sums,
        batch.pages,
        pools.page_kept,
        batch.num_pages,
        batch.history_lo,
        batch.history_hi,
        batch.budget_blocks,
        batch.index_kind,
        batch.retention,
        work.shares,
        work.keys,
        work.blocks,
        work.coverage,
        float(2 ** definition.probability_shift(group)),
        batch.pages.stride(0),
        work.tops.shape[3],
        work.blocks.shape[2],
        H=geometry.num_kv_heads,
        G=group,
        G_PAD=padded,
        K_PAD=triton.next_power_of_2(work.blocks.shape[2]),
        GROUP_TILE=max(16, ELEMENTS // padded),
        TILE=TILE,
        enable_fp_fusion=False,
        num_warps=16,
    )
