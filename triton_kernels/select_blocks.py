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

from ..types import Geometry, LayerPools, SparseBatch
from .locate_sentences import GRANULE, sentence_row
from .ordered import LOWEST, to_ordered
from .workspace import Workspace

TILE = 512  # sentences at once; no fewer than the tokens of a block

EMPTY = tl.constexpr(LOWEST)


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
    blocks,
    coverage,
    ends_stride,
    first_stride,
    row_pages_stride,
    max_sentences,
    max_selected,
    H: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    GRANULE: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
):
    s = tl.program_id(0)
    h = tl.program_id(1)
    head = s.to(tl.int64) * H + h
    lo = tl.load(history_lo + s)
    hi = tl.load(history_hi + s)
    budget = tl.load(budget_blocks + s)
    count = tl.load(num_sentences + s)
    ends += s.to(tl.int64) * ends_stride
    row_pages += s.to(tl.int64) * row_pages_stride
    scores += head * max_sentences
    mass += head * (max_sentences + 1)
    blocks += head * max_selected

    order = tl.arange(0, BLOCKS)
    tl.store(blocks + order, -1, mask=(order >= budget) & (order < max_selected))
    j = lo + order
    valid = j < hi
    if budget == hi - lo:
        tl.store(blocks + order, j, mask=valid)
        tl.store(coverage + head, 1.0)
        return

    first += s.to(tl.int64) * first_stride
    sentence = tl.load(first + j * (N // GRANULE), mask=valid, other=0)
    last = tl.load(first + (j + 1) * (N // GRANULE), mask=valid, other=-1)
    # The sentence of the next block's first token may begin there.
    before = valid & (last > sentence)
    aligned = tl.load(ends + last - 1, mask=before, other=0) == (j + 1) * N
    last = tl.minimum(tl.where(before & aligned, last - 1, last), count - 1)
    key = tl.full((BLOCKS,), EMPTY, tl.int32)
    for _ in range(tl.max(last - sentence, 0) + 1):
        score = tl.load(scores + sentence, mask=sentence <= last, other=float("-inf"))
        code = tl.where(score > float("-inf"), to_ordered(score), EMPTY)
        key = tl.maximum(code, key)
        sentence += 1

    # The largest threshold that at least `budget` keys reach, from the highest bit down.
    ranked = key.to(tl.uint32, bitcast=True) ^ 0x80000000
    threshold = tl.zeros((), tl.uint32)
    for b in tl.static_range(31, -1, -1):
        raised = threshold | (1 << b)
        reached = tl.sum((valid & (ranked >= raised)).to(tl.int32), 0)
        threshold = tl.where(reached >= budget, raised, threshold)
    above = valid & (ranked > threshold)
    tied = valid & (ranked == threshold)
    missing = budget - tl.sum(above.to(tl.int32), 0)
    tied = tied & (tl.cumsum(tied.to(tl.int32), 0) <= missing)
    chosen = above | tied
    position = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(blocks + position, j, mask=chosen)

    # The last tied block came with the first sentence of that score that touches it; equally
    # good sentences after it were not taken.
    end_code = (threshold ^ 0x80000000).to(tl.int32, bitcast=True)
    end_block = tl.max(tl.where(tied, j, -1), 0)
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
        row = sentence_row(row_pages, i, known, M)
        tl.store(kept + row * H + h, taken.to(tl.uint8), mask=known)
        covered += tl.load(mass + i, mask=taken, other=0.0)
    tl.store(coverage + head, tl.sum(covered, 0) + tl.load(mass + max_sentences))


def select_blocks(
    geometry: Geometry, pools: LayerPools, batch: SparseBatch, work: Workspace
) -> tuple[Tensor, Tensor]:
    """`ops.select_blocks`, from `scores`, `mass` and `first` in `work`.

    Returns:
        blocks [>= S, H, K] int32 and coverage [>= S, H] of `work`; K is that of the
        workspace, not the largest budget of the batch, so that shapes are fixed. So is the
        kernel: a key for each block of the longest request, whatever the batch holds.
    """
    max_blocks = (work.first.shape[1] - 1) * GRANULE // geometry.block_size
    padded = triton.next_power_of_2(max(max_blocks, work.blocks.shape[2]))
    _select_blocks[(len(batch.budget_blocks), geometry.num_kv_heads)](
        work.scores,
        work.mass,
        batch.sentence_ends,
        batch.num_sentences,
        work.first,
        batch.row_pages,
        pools.kept,
        batch.history_lo,
        batch.history_hi,
        batch.budget_blocks,
        work.blocks,
        work.coverage,
        batch.sentence_ends.stride(0),
        work.first.stride(0),
        batch.row_pages.stride(0),
        work.scores.shape[2],
        work.blocks.shape[2],
        H=geometry.num_kv_heads,
        N=geometry.block_size,
        M=geometry.rows_per_page,
        GRANULE=GRANULE,
        BLOCKS=padded,
        TILE=TILE,
        num_warps=min(32, max(4, padded // 256)),
    )
    return work.blocks, work.coverage
