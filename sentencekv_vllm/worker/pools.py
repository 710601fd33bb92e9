# SPDX-License-Identifier: Apache-2.0
"""Allocation of the swap pool and of the index that stays on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops.basis import plain_basis
from ..types import Basis, Geometry, LayerPools
from .host_memory import HostPool
from .transfer import upload


class Pools:
    """One worker's memory, allocated once and released with this object.

    The index has as many pages as the swap pool, so its size follows from `host_pool_gib` and
    a request that gets host pages has its index memory, too.
    """

    def __init__(
        self,
        geometry: Geometry,
        num_pages: int,
        caches: Sequence[Tensor],
        bases: Sequence[Basis] | None = None,
    ) -> None:
        """Allocate for `num_pages` host pages.

        Args:
            geometry: this worker's shapes.
            num_pages: pages of the swap pool, each holding one block of every layer.
            caches: vLLM's KV cache of each layer, [B, H, N, 2D].
            bases: in which each layer's keys are coded; None: the fixed one.

        Raises:
            ConfigError: host memory is too small for a pinned swap pool.
        """
        g, device = geometry, caches[0].device
        layers, pages, heads = g.num_layers, num_pages, g.num_kv_heads
        blocks, rows = len(caches[0]), num_pages * g.rows_per_page
        n, d = g.block_size, g.head_dim

        def on_device(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.empty((layers, *shape), dtype=dtype, device=device)

        form = g.host_format
        self._host_pool = HostPool(
            (layers, pages, heads, *((n, 2 * d) if form is None else (form.head_block_bytes,))),
            caches[0].dtype if form is None else torch.uint8,
            pinned=device.type == "cuda",
        )
        self.host = self._host_pool.tensor
        w = g.code_width
        self.codes = on_device((pages, heads, w // 8, n), torch.uint8) if w else None
        self.scales = on_device((pages, heads, n), torch.bfloat16) if w else None
        self.means = on_device((pages, heads, d), torch.int8) if w else None
        self.mean_scales = on_device((pages, heads), torch.float32) if w else None
        self.page_kept = on_device((pages, heads), torch.uint8) if w else None
        if bases is None and w:
            bases = [plain_basis(heads, d, w, device) for _ in range(layers)]
        self.bases = bases if w else None
        vectors = g.vectors_per_row
        self.centroids = on_device((rows, heads, d), torch.bfloat16) if vectors else None
        self.spreads = on_device((rows, heads, d), torch.bfloat16) if vectors == 2 else None
        self.kept = on_device((rows, heads), torch.uint8) if vectors else None
        for flags in (self.page_kept, self.kept):
            if flags is not None:
                flags.zero_()
        self.page_slot = on_device((pages, heads), torch.int32).fill_(-1)
        self.slot_page = on_device((blocks, heads), torch.int32).fill_(-1)
        self.slot_stamp = on_device((blocks, heads), torch.int32).fill_(-1)
        self.layers = [
            LayerPools(
                cache=caches[i],
                host=self.host[i],
                page_slot=self.page_slot[i],
                slot_page=self.slot_page[i],
                slot_stamp=self.slot_stamp[i],
                host_format=form,
                **{name: part[i] for name, part in self._index().items()},
            )
            for i in range(layers)
        ]

    def _index(self) -> dict[str, Any]:
        """What there is of the index, by the names of `LayerPools`, a layer each."""
        parts = {
            "codes": self.codes,
            "scales": self.scales,
            "means": self.means,
            "mean_scales": self.mean_scales,
            "page_kept": self.page_kept,
            "basis": self.bases,
            "centroids": self.centroids,
            "spreads": self.spreads,
            "kept": self.kept,
        }
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def host_bytes(self) -> int:
        return self.host.nbytes

    @property
    def index_bytes(self) -> int:
        return sum(part.nbytes for part in self._index().values() if isinstance(part, Tensor))

    @property
    def page_bytes(self) -> int:
        """One block of every layer, as it lies in the swap pool."""
        return self.host.nbytes // max(1, self.host.shape[1])

    @property
    def head_block_bytes(self) -> int:
        """Of the swap pool: what a miss copies."""
        layers, _, heads = self.host.shape[:3]
        return self.page_bytes // (layers * heads)

    def empty_slots(self, block_ids: list[int]) -> None:
        """Forget what the blocks held: they have a new owner."""
        (ids,) = upload([np.asarray(block_ids, np.int64)], self.slot_page.device)
        self.slot_page.index_fill_(1, ids, -1)
        self.slot_stamp.index_fill_(1, ids, -1)

    def reset(self) -> None:
        """Nothing is resident, and nothing was ever selected."""
        for flags in (self.page_kept, self.kept):
            if flags is not None:
                flags.zero_()
        for table in (self.page_slot, self.slot_page, self.slot_stamp):
            table.fill_(-1)

    def close(self) -> None:
        """Unpin the swap pool, once the device has finished with it."""
        if self.slot_page.is_cuda:
            torch.cuda.synchronize(self.slot_page.device)
        self._host_pool.close()
