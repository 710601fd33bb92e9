# SPDX-License-Identifier: Apache-2.0
"""Slot lookup with LRU: which selected head-blocks are on the GPU, and who makes room."""

from __future__ import annotations

import torch

from ..types import LayerPools, Residency, Selection, SparseBatch


def resolve_residency(pools: LayerPools, batch: SparseBatch, selection: Selection) -> Residency:
    """Find or make a slot for every selected head-block.

    Hits are stamped with the step. Each miss takes the slot of its request and KV head
    that was selected longest ago (never one selected in this step; ties: the lower
    position in `private_blocks`; empty slots have stamp -1 and go first). Misses are listed
    by request, KV head and position in the selection.

    `page_slot`, `slot_page` and `slot_stamp` are updated as if the misses were already
    copied; the caller copies them before attention reads the slots.
    """
    num_requests, heads, k_max = selection.blocks.shape
    slots = torch.full((num_requests, heads, k_max), -1, dtype=torch.int32)
    misses: list[tuple[int, int, int]] = []
    for s in range(num_requests):
        private = batch.private_blocks[s].tolist()
        for h in range(heads):
            missing: list[tuple[int, int]] = []
            for k in range(int(batch.budget_blocks[s])):
                page = int(batch.pages[s, int(selection.blocks[s, h, k])])
                slot = int(pools.page_slot[page, h])
                if slot < 0:
                    missing.append((k, page))
                    continue
                slots[s, h, k] = slot
                pools.slot_stamp[slot, h] = batch.step
            victims = sorted(
                (b for b in private if int(pools.slot_stamp[b, h]) != batch.step),
                key=lambda b: (int(pools.slot_stamp[b, h]), private.index(b)),
            )
            assert len(missing) <= len(victims), "the working set holds what one step selects"
            for (k, page), victim in zip(missing, victims, strict=False):
                former = int(pools.slot_page[victim, h])
                if former >= 0:
                    pools.page_slot[former, h] = -1
                pools.slot_page[victim, h] = page
                pools.page_slot[page, h] = victim
                pools.slot_stamp[victim, h] = batch.step
                slots[s, h, k] = victim
                misses.append((page, h, victim))
    return Residency(slots, torch.tensor(misses, dtype=torch.int32).reshape(-1, 3))
