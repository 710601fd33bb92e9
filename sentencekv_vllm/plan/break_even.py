# SPDX-License-Identifier: Apache-2.0
"""When swapping in costs as much as reading everything would."""

from __future__ import annotations

from dataclasses import dataclass

from ..resolved import ResolvedConfig
from .capacity import Need
from .machine import Machine


@dataclass(frozen=True)
class BreakEven:
    """Of one decode step of one request on one worker, all layers; only bytes are counted.

    A dense step reads `dense_bytes`; a sparse one reads `sparse_bytes` (index and selected blocks)
    on the device and, at hit rate h, moves `(1 - h) * miss_bytes` over the link. They take as long
    where `(1 - h) * miss_bytes / link = (dense_bytes - sparse_bytes) / device`.
    """

    dense_bytes: int
    sparse_bytes: int
    miss_bytes: int  # if every selected block of the history were missing
    hit_rate: float | None  # above it the sparse step moves faster; None: it never does
    link_bandwidth: float | None  # bytes/s, at which every block may miss; None: no link is enough


def break_even(
    context: int, need: Need, resolved: ResolvedConfig, block_bytes: int, machine: Machine
) -> BreakEven:
    """For a request of `context` tokens.

    Args:
        block_bytes: KV of one block in the cache, all layers.
    """
    token_bytes = block_bytes // resolved.block_size
    attended = min(context, resolved.config.token_budget)
    dense = context * token_bytes
    sparse = attended * token_bytes + need.host_pages * resolved.index_page_bytes
    misses = resolved.budget_blocks * resolved.page_bytes
    saved = dense - sparse
    if saved <= 0 or not misses:
        return BreakEven(dense, sparse, misses, None, None)
    saved_s = saved / machine.device_bandwidth
    rate = 1 - saved_s * machine.link_bandwidth / misses
    return BreakEven(dense, sparse, misses, min(1.0, max(0.0, rate)), misses / saved_s)
