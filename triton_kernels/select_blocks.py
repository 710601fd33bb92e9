# SPDX-License-Identifier: Apache-2.0
"""Ranked fill of the token budget without a sort.

The definition takes sentences in descending score and lets each bring its blocks. A block
therefore enters with the best sentence that touches it, and blocks of equally good
sentences enter from left to right. So the selection is the `budget` blocks of largest key,
ties to the left, where a block's key is the largest score among its sentences; the key that
ends the selection is found bit by bit.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..types import Geometry, IndexKind, LayerPools, SparseBatch
from .locate_sentences import GRANULE, sentence_row
from .ordered import LOWEST, to_ordered
from .take_largest import count_above, last_key, load_keys, take
from .workspace import Workspace

TILE = 512  # sentences at once; no fewer than the tokens of a block
BLOCKS = 2048  # at once

EMPTY = tl.constexpr(LOWEST)
TOKEN_CODES = tl.constexpr(int(IndexKind.TOKEN_CODES))


@triton.jit
def block_keys(scores, ends, first, j, valid, count, N: tl.constexpr, GRANULE: tl.constexpr):
    """Ordered code of the largest score among the sentences of blocks `j`."""
    sentence = tl.load(first + j * (N // GRANULE), mask=valid, other=0)
    last = tl.load(first + (j + 1) * (N // GRANULE), mask=valid, other=-1)
    # The sentence of the next block's first token may begin there.
    before = valid & (last > sentence)
    aligned = tl.load(ends + last - 1, mask=before, other=0) == (j + 1) * N
    last = tl.minimum(tl.where(before & aligned, last - 1, last), count - 1)
    key = tl.zeros_like(j) + EMPTY
    for _ in range(tl.max(last - sentence, 0) + 1):
        score = tl.load(scores + sentence, mask=sentence <= last, other=float("-inf"))
        code = tl.where(score > float("-inf"), to_ordered(score), EMPTY)
        key = tl.maximum(code, key)
        sentence += 1
    return key


@triton.jit(do_not_specialize=["kept", "ends_stride", "row_pages_stride"])
def _select_blocks(
    scores,
    mass,
    ends,
    num_sentences,
    first,
    row_pages,
    kept,
    history_lo,
    history_hi,
    budget_blocks,
    index_kind,
    keys,
    blocks,
    coverage,
    ends_stride,
    first_stride,
    row_pages_stride,
    max_sentences,
    max_pages,
    max_selected,
    H: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    GRANULE: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
):
    s = tl.program_id(0)
    h = tl.program_id(1)
    if tl.load(index_kind + s) == TOKEN_CODES:
        return
    head = s.to(tl.int64) * H + h
    lo = tl.load(history_lo + s)
    hi = tl.load(history_hi + s)
    budget = tl.load(budget_blocks + s)
    count = tl.load(num_sentences + s)
    ends += s.to(tl.int64) * ends_stride
    row_pages += s.to(tl.int64) * row_pages_stride
    scores += head * max_sentences
    mass += head * max_sentences
    keys += head * max_pages
    blocks += head * max_selected

    order = tl.arange(0, K_PAD)
    if budget == hi - lo:
        tl.store(
            blocks + order, tl.where(order < budget, lo + order, -1), mask=order < max_selected
        )
        tl.store(coverage + head, 1.0)
        return
    tl.store(blocks + order, -1, mask=(order >= budget) & (order < max_selected))

    first += s.to(tl.int64) * first_stride
    for begin in range(lo, hi, BLOCKS):
        j = begin + tl.arange(0, BLOCKS)
        code = block_keys(scores, ends, first, j, j < hi, count, N, GRANULE)
        tl.store(keys + j, code ^ EMPTY, mask=j < hi)
    tl.debug_barrier()
    threshold = last_key(keys, lo, hi, budget, BLOCKS)
    ties = budget - count_above(keys, lo, hi, threshold, BLOCKS)
    position = tl.zeros((), tl.int32)
    end_block = tl.full((), -1, tl.int32)
    for begin in range(lo, hi, BLOCKS):
        j = begin + tl.arange(0, BLOCKS)
        key = load_keys(keys, j, j < hi)
        chosen, place, ties, position = take(key, j < hi, threshold, ties, position)
        tl.store(blocks + place, j, mask=chosen)
        tied = chosen & (key == threshold)
        end_block = tl.maximum(end_block, tl.max(tl.where(tied, j, -1), 0))

    # The last tied block came with the first sentence of that score that touches it; equally
    # good sentences after it were not taken.
    end_code = (threshold ^ 0x80000000).to(tl.int32, bitcast=True)
    i = tl.load(first + end_block * (N // GRANULE), mask=end_block >= 0, other=count)
    i += tl.arange(0, TILE)
    score = tl.load(scores + i, mask=i < count, other=float("-inf"))
    end_sentence = tl.min(tl.where(to_ordered(score) == end_code, i, count), 0)
    covered = tl.zeros((TILE,), tl.float32)
    for begin in range(0, count, TILE):
        i = begin + tl.arange(0, TILE)
        known = i < count
        score = tl.load(scores + i, mask=known, other=float("-inf"))
        code = to_ordered(score)
        taken = (code > end_code) | ((code == end_code) & (i <= end_sentence))
        taken = taken & (score > float("-inf"))
        if HAS_ROWS:
            row = sentence_row(row_pages, i, known, M)
            tl.store(kept + row * H + h, taken.to(tl.uint8), mask=known)
        covered += tl.load(mass + i, mask=taken, other=0.0)
    tl.store(coverage + head, tl.sum(covered, 0))


def select_blocks(
    geometry: Geometry, pools: LayerPools, batch: SparseBatch, work: Workspace
) -> tuple[Tensor, Tensor]:
    """`ops.select_blocks`, from `scores`, `mass` and `first` in `work`.

    Rows of TOKEN_CODES keep what `work.blocks` and `work.coverage` hold.

    Returns:
        blocks [>= S, H, K] int32 and coverage [>= S, H] of `work`; K is that of the
        workspace, not the largest budget of the batch, so that shapes are fixed.
    """
    _select_blocks[(len(batch.budget_blocks), geometry.num_kv_heads)](
        work.scores,
        work.mass,
        batch.sentence_ends,
        batch.num_sentences,
        work.first,
        batch.row_pages,
        work.first if pools.kept is None else pools.kept,
        batch.history_lo,
        batch.history_hi,
        batch.budget_blocks,
        batch.index_kind,
        work.keys,
        work.blocks,
        work.coverage,
        batch.sentence_ends.stride(0),
        work.first.stride(0),
        batch.row_pages.stride(0),
        work.scores.shape[2],
        work.keys.shape[2],
        work.blocks.shape[2],
        H=geometry.num_kv_heads,
        N=geometry.block_size,
        M=geometry.rows_per_page,
        HAS_ROWS=pools.kept is not None,
        GRANULE=GRANULE,
        K_PAD=triton.next_power_of_2(work.blocks.shape[2]),
        BLOCKS=BLOCKS,
        TILE=TILE,
        num_warps=16,
    )
    return work.blocks, work.coverage
