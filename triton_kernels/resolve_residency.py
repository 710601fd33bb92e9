# SPDX-License-Identifier: Apache-2.0
"""Slot lookup with LRU for all requests and KV heads of a layer, in one launch."""

import triton
import triton.language as tl

from ..ops.layer_ops import DecodeOutputs
from ..types import LayerPools, Residency, SparseBatch
from .workspace import Workspace


@triton.jit(
    do_not_specialize=[
        *("page_slot", "slot_page", "slot_stamp"),
        *("pages_stride", "tables_request_stride", "tables_head_stride"),
    ]
)
def _resolve_residency(
    blocks,
    coverage,
    pages,
    private_blocks,
    history_lo,
    budget_blocks,
    page_slot,
    slot_page,
    slot_stamp,
    step,
    slots,
    misses,
    num_misses,
    head_tables,
    hit_counts,
    miss_counts,
    coverage_sums,
    pages_stride,
    private_stride,
    tables_request_stride,
    tables_head_stride,
    num_private,
    max_selected,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    R_PAD: tl.constexpr,
):
    s = tl.program_id(0)
    h = tl.program_id(1)
    head = s.to(tl.int64) * H + h
    budget = tl.load(budget_blocks + s)
    now = tl.load(step)
    k = tl.arange(0, K_PAD)
    wanted = k < budget
    block = tl.load(blocks + head * max_selected + k, mask=wanted, other=0)
    page = tl.load(pages + s.to(tl.int64) * pages_stride + block, mask=wanted, other=0)
    page_entry = page.to(tl.int64) * H + h
    slot = tl.load(page_slot + page_entry, mask=wanted, other=-1)
    hit = slot >= 0
    tl.store(slot_stamp + slot.to(tl.int64) * H + h, now, mask=hit)
    tl.debug_barrier()  # the stamps of the hits protect them from becoming victims

    r = tl.arange(0, R_PAD)
    private = private_blocks + s.to(tl.int64) * private_stride
    owned = tl.load(private + r, mask=r < num_private, other=-1)
    stamp = tl.load(slot_stamp + owned.to(tl.int64) * H + h, mask=owned >= 0, other=now)
    age = tl.where(stamp == now, 2**31 - 2, stamp)  # not a victim: last
    # By age, then by position. Stamps start at -1.
    oldest = tl.sort((age + 1).to(tl.int64) << 32 | r)
    missing = wanted & (slot < 0)
    order = tl.cumsum(missing.to(tl.int32), 0) - 1
    place = tl.gather(
        (oldest & 0xFFFFFFFF).to(tl.int32), tl.minimum(tl.maximum(order, 0), R_PAD - 1), 0
    )
    victim = tl.load(private + place, mask=missing, other=0)
    victim_entry = victim.to(tl.int64) * H + h
    former = tl.load(slot_page + victim_entry, mask=missing, other=-1)
    former_entry = former.to(tl.int64) * H + h
    # A reissued page may still be named by a slot that lost it: only its holder clears it.
    holder = tl.load(page_slot + former_entry, mask=former >= 0, other=-1)
    tl.debug_barrier()  # every holder is read before any page changes hands
    tl.store(page_slot + former_entry, -1, mask=(former >= 0) & (holder == victim))
    tl.store(page_slot + page_entry, victim, mask=missing)
    tl.store(slot_page + victim_entry, page, mask=missing)
    tl.store(slot_stamp + victim_entry, now, mask=missing)

    slot = tl.where(missing, victim, slot)
    tl.store(slots + head * max_selected + k, slot, mask=k < max_selected)
    table = head_tables + s.to(tl.int64) * tables_request_stride
    table += h.to(tl.int64) * tables_head_stride + tl.load(history_lo + s)
    tl.store(table + k, slot * H + h, mask=wanted)

    num_missing = tl.sum(missing.to(tl.int32), 0)
    target = misses + (tl.atomic_add(num_misses, num_missing) + order).to(tl.int64) * 3
    tl.store(target, page, mask=missing)
    tl.store(target + 1, h, mask=missing)
    tl.store(target + 2, victim, mask=missing)
    tl.atomic_add(miss_counts + s, num_missing.to(tl.int64))
    tl.atomic_add(hit_counts + s, (budget - num_missing).to(tl.int64))
    if h == 0:
        heads = tl.arange(0, H_PAD)
        shares = tl.load(coverage + s.to(tl.int64) * H + heads, mask=heads < H, other=0.0)
        mean = tl.sum(shares, 0) / H
        tl.store(coverage_sums + s, tl.load(coverage_sums + s) + mean)


def resolve_residency(
    pools: LayerPools, batch: SparseBatch, work: Workspace, out: DecodeOutputs
) -> Residency:
    """`ops.resolve_residency` for the selection in `work`, and the layer's tallies.

    Requests share neither pages nor private blocks, so programs do not meet. Writes the
    columns of `out.head_tables` that the selection fills; adds to `hits`, `misses` and
    `coverage`.

    Returns:
        Residency whose `misses` has room for every head-block. The first
        `work.num_misses` rows count, which must be 0 before the call; the rows of one KV
        head are in the order of the selection, KV heads in any order.
    """
    requests, num_private = batch.private_blocks.shape
    heads, max_selected = work.blocks.shape[1:]
    _resolve_residency[(requests, heads)](
        work.blocks,
        work.coverage,
        batch.pages,
        batch.private_blocks,
        batch.history_lo,
        batch.budget_blocks,
        pools.page_slot,
        pools.slot_page,
        pools.slot_stamp,
        work.step,
        work.slots,
        work.misses,
        work.num_misses,
        out.head_tables,
        out.hits,
        out.misses,
        out.coverage,
        batch.pages.stride(0),
        batch.private_blocks.stride(0),
        out.head_tables.stride(0),
        out.head_tables.stride(1),
        num_private,
        max_selected,
        H=heads,
        H_PAD=triton.next_power_of_2(heads),
        K_PAD=triton.next_power_of_2(max_selected),
        R_PAD=triton.next_power_of_2(num_private),
    )
    return Residency(work.slots, work.misses)
