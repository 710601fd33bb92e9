# SPDX-License-Identifier: Apache-2.0
"""Histories that are on the host only visit the device, one layer's at a time, in a step.

Attention of a layer reads the history of that layer only, and vLLM's KV cache is one buffer
`[L, B, ...]`: block b of layer m is block `m * B + b` of the whole. So a private block, which
is a block in every layer, has room for L blocks of the layer at hand, and the stock op runs once
over a table that names them. Same kernel, same bytes in the same order: the same bits as if the
history had stayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..messages import Int32s, VisitRows
from ..ops.stage_pages import StagePages, page_stager
from .pools import Pools
from .tables import Tables
from .transfer import Array, upload
from .visit_stream import VisitStream


def whole_cache(caches: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """vLLM's KV cache of all layers as one, [L * B, H, N, 2D], and the first block of each layer.

    Raises:
        ValueError: the layers do not lie side by side in one buffer.
    """
    lowest = min(caches, key=lambda cache: cache.data_ptr())
    storage, size = lowest.untyped_storage().data_ptr(), lowest.nbytes
    distances = [cache.data_ptr() - lowest.data_ptr() for cache in caches]
    if (
        sorted(distances) != [i * size for i in range(len(caches))]
        or any(cache.untyped_storage().data_ptr() != storage for cache in caches)
        or any(cache.shape != lowest.shape for cache in caches)
    ):
        raise ValueError(
            "the layers of vLLM's KV cache do not lie side by side in one buffer, so prompts "
            'cannot exceed it: set --additional-config \'{"sentencekv": {"visits": false}}\''
        )
    shape = (len(caches) * len(lowest), *lowest.shape[1:])
    whole = lowest.as_strided(shape, lowest.stride(), lowest.storage_offset())
    return whole, [distance // size * len(lowest) for distance in distances]


def staged_blocks(
    staging: Int32s, count: int, half: int, halves: int, sizes: tuple[int, int]
) -> Array:
    """Blocks of the whole cache that hold the first `count` blocks of a visiting history.

    Place i of a half stays where it is while the history grows.

    Args:
        staging: [k] private blocks.
        sizes: layers, and blocks of a layer.
    """
    layers, blocks = sizes
    place = halves * np.arange(count) + half
    return (place % layers * blocks + staging[place // layers]).astype(np.int32)


@dataclass(frozen=True)
class Visit:
    """The visiting rows of one step."""

    block_table: Tensor  # [R, W] int32 of the dense rows
    rows: Tensor  # [n] int64: cells of the table whose blocks are on the host
    columns: Tensor  # [n] int64
    staged: list[Tensor]  # by half, [n] int32: their blocks in the whole cache
    pairs: list[Tensor]  # by half, [n, 2] int32 on the CPU: page and block


class Visits:
    """A worker's staging; one step at a time."""

    def __init__(
        self,
        pools: Pools,
        tables: Tables,
        caches: Sequence[Tensor],
        stream: VisitStream,
        layer_names: Sequence[str],
    ) -> None:
        """Raises ValueError, see `whole_cache`."""
        self.layer_index = {name: i for i, name in enumerate(layer_names)}
        self.whole, self._first = whole_cache(caches)
        self._bytes = 0
        self._num_layers, self._blocks = len(caches), len(caches[0])
        self._pools, self._tables, self._stream = pools, tables, stream
        self._stage: StagePages = page_stager(self.whole.device)
        self._visit: Visit | None = None

    def begin(self, rows: VisitRows, found: Array, block_table: Tensor) -> None:
        """Queue the copies of the first layers.

        Args:
            found: [n] the rows' places in the batch.
            block_table: [R, W] int32 of the batch.
        """
        halves, sizes = self._stream.halves, (self._num_layers, self._blocks)
        spans = list(zip(rows.slots, rows.lost_lo, rows.lost_hi, strict=True))
        counts = rows.lost_hi - rows.lost_lo
        columns = np.concatenate([np.arange(lo, hi) for _, lo, hi in spans])
        pages = np.concatenate([self._tables.pages.of(s)[lo:hi] for s, lo, hi in spans])
        staged = [
            np.concatenate(
                [
                    staged_blocks(self._tables.staging[s], hi - lo, half, halves, sizes)
                    for s, lo, hi in spans
                ]
            )
            for half in range(halves)
        ]
        where = [np.repeat(found, counts).astype(np.int64), columns.astype(np.int64)]
        at, columns_of, *blocks = upload([*where, *staged], self.whole.device)
        pairs = [torch.from_numpy(np.stack((pages, s), 1)) for s in staged]
        self._visit = Visit(block_table, at, columns_of, blocks, pairs)
        self._stream.start()
        for layer in range(min(halves, self._num_layers)):
            self._bring(layer)

    def table(self, layer: int) -> Tensor:
        """[R, W] int32: the batch's block table of a layer, in blocks of the whole cache. Its
        history is on the device after it."""
        visit = self._visit
        assert visit is not None, "begin comes first"
        self._stream.wait(layer)
        table = visit.block_table + self._first[layer]
        table[visit.rows, visit.columns] = visit.staged[layer % self._stream.halves]
        return table

    def leave(self, layer: int) -> None:
        """The layer's attention is queued: its half is for another one."""
        self._stream.read(layer)
        if layer + self._stream.halves < self._num_layers:
            self._bring(layer + self._stream.halves)

    def take_bytes(self) -> int:
        """Bytes copied since the last call."""
        taken, self._bytes = self._bytes, 0
        return taken

    def _bring(self, layer: int) -> None:
        assert self._visit is not None, "begin comes first"
        pairs = self._visit.pairs[layer % self._stream.halves]
        self._stream.bring(layer, lambda: self._stage(self._pools.host[layer], self.whole, pairs))
        self._bytes += len(pairs) * self._pools.page_bytes // self._num_layers
