# SPDX-License-Identifier: Apache-2.0
"""The largest of many keys without a sort: the key that ends the selection is found bit by bit.

Keys lie in memory and are looked through in tiles, so there may be any number of them. They are
uint32 in the bits of int32.
"""

import triton
import triton.language as tl


@triton.jit
def load_keys(keys, i, valid):
    return tl.load(keys + i, mask=valid, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def count_above(keys, lo, hi, threshold, TILE: tl.constexpr):
    """How many of keys [lo, hi) are larger than the threshold."""
    larger = tl.zeros((TILE,), tl.int32)
    for begin in range(lo, hi, TILE):
        i = begin + tl.arange(0, TILE)
        larger += (load_keys(keys, i, i < hi) > threshold).to(tl.int32)
    return tl.sum(larger, 0)


@triton.jit
def last_key(keys, lo, hi, budget, TILE: tl.constexpr):
    """The largest threshold that at least `budget` of keys [lo, hi) reach."""
    threshold = tl.zeros((), tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        raised = threshold | bit
        reached = count_above(keys, lo, hi, raised - 1, TILE)
        threshold = tl.where(reached >= budget, raised, threshold)
        bit = bit >> 1
    return threshold


@triton.jit
def take(key, valid, threshold, ties, position):
    """What a tile of keys adds to the selection, from left to right.

    Args:
        ties: keys equal to the threshold that may still be taken.
        position: keys taken so far.

    Returns:
        which keys are taken, their places among all that are, and the two numbers after the tile.
    """
    tied = valid & (key == threshold)
    chosen = valid & ((key > threshold) | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= ties)))
    place = position + tl.cumsum(chosen.to(tl.int32), 0) - 1
    ties -= tl.sum(tied.to(tl.int32), 0)
    return chosen, place, ties, position + tl.sum(chosen.to(tl.int32), 0)
