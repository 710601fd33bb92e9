# SPDX-License-Identifier: Apache-2.0
"""How many requests of one length fit, with all of their KV on the GPU and with most of it not."""

from __future__ import annotations

from dataclasses import dataclass

from ..resolved import ResolvedConfig, blocks
from ..scheduler.visit_room import VisitRoom
from .machine import Machine


@dataclass(frozen=True)
class Need:
    """Of one request, in blocks of one worker."""

    dense_blocks: int  # its KV
    prefill_blocks: int  # while it is prefilled, its history in the swap pool if need be
    sparse_blocks: int  # while it decodes sparsely, at most
    host_pages: int

    @classmethod
    def of(cls, context: int, resolved: ResolvedConfig, machine: Machine) -> Need:
        """Args: context: tokens of prompt and answer."""
        dense = blocks(context, resolved.block_size)
        in_flight = machine.batches_in_flight * machine.chunk_tokens
        room = VisitRoom.of(resolved, machine.staging_halves, in_flight)
        visits = resolved.histories_may_visit
        return cls(
            dense_blocks=dense,
            prefill_blocks=min(dense, room.floor(context)) if visits else dense,
            sparse_blocks=min(dense, resolved.resident_blocks),
            host_pages=context // resolved.block_size,  # every full block, see scheduler/copying
        )


@dataclass(frozen=True)
class Capacity:
    """Requests at once."""

    kv_blocks: int  # that the GPU holds, vLLM's null block included
    dense_requests: int
    sparse_requests: int
    limited_by: str  # what ends the number of sparse requests


def dense_requests(need: Need, kv_blocks: int) -> int:
    return max(0, kv_blocks - 1) // need.dense_blocks  # one is vLLM's null block


def sparse_requests(need: Need, kv_blocks: int) -> int:
    """The last of them is being prefilled, which takes more blocks than decoding."""
    room = kv_blocks - 1 - need.prefill_blocks
    return 0 if room < 0 else 1 + room // need.sparse_blocks


def requests_with_index(
    need: Need, resolved: ResolvedConfig, block_bytes: int, device_bytes: int
) -> int:
    """Sparse requests whose blocks and index fit into memory that both share: each adds its
    resident blocks and the index of its host pages."""
    index = need.host_pages * resolved.index_page_bytes
    first = (1 + need.prefill_blocks) * block_bytes + index
    if device_bytes < first:
        return 0
    return 1 + (device_bytes - first) // (need.sparse_blocks * block_bytes + index)
