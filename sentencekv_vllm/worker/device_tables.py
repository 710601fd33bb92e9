# SPDX-License-Identifier: Apache-2.0
"""The tables of the tracked requests on the device, brought up to date by small differences."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..messages import Int32s
from .tables import Tables
from .transfer import Array, upload


class DeviceTables:
    """A copy of `Tables`, [num_slots + 1, width] each; the last row is nobody's and empty.

    Requests only append, so that a step sends what came since the last one: nothing in most
    steps, and never the tables.
    """

    def __init__(
        self, tables: Tables, max_pages: int, max_sentences: int, device: torch.device
    ) -> None:
        """Allocate for the largest request.

        Args:
            tables: what is copied.
            max_pages: blocks of one request.
            max_sentences: of one request.
        """
        self._tables = tables
        num_slots, working_set = tables.private.shape
        self.null_slot = num_slots
        max_row_pages = -(-max_sentences // tables.rows_per_page)
        widths = (max_pages, max_row_pages, max_sentences, working_set)
        sizes = [(num_slots + 1) * width for width in widths]
        self._storage = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self._starts = np.cumsum([0, *sizes[:-1]])
        self.pages, self.row_pages, self.ends, self.private = (
            part.view(num_slots + 1, width)
            for part, width in zip(self._storage.split(sizes), widths, strict=True)
        )
        self._sent = np.zeros((len(widths), num_slots), np.int64)
        self._owner = np.full(num_slots, -1, np.int64)
        self._changes = np.full(num_slots, -1, np.int64)  # that the device knows of

    def update(self, slots: Int32s) -> None:
        """Send what the given requests have and the device does not."""
        tables = self._tables
        slots = slots[self._changes[slots] != tables.changes[slots]]
        if not len(slots):
            return
        self._changes[slots] = tables.changes[slots]
        gone = slots[self._owner[slots] != tables.owners[slots]]
        self._sent[:, gone] = 0
        self._owner[gone] = tables.owners[gone]
        places: list[Array] = []
        values: list[Array] = []
        growing = (tables.pages, tables.row_pages, tables.ends)
        for i, (table, target) in enumerate(
            zip(growing, (self.pages, self.row_pages, self.ends), strict=True)
        ):
            width = target.shape[1]
            counts = np.minimum(table.counts[slots], width)  # entries behind it are never read
            for row in np.flatnonzero(counts > self._sent[i, slots]):
                slot, first, count = slots[row], int(self._sent[i, slots[row]]), counts[row]
                places.append(self._starts[i] + slot * width + np.arange(first, count))
                values.append(table.values[slot, first:count])
            self._sent[i, slots] = counts
        width = self.private.shape[1]
        for slot in slots[self._sent[3, slots] != width]:
            places.append(self._starts[3] + slot * width + np.arange(width))
            values.append(tables.private[slot])
        self._sent[3, slots] = width
        if places:
            index, content = upload(
                [np.concatenate(places), np.concatenate(values)], self._storage.device
            )
            self._storage.index_copy_(0, index, content)

    def gather(
        self, slots: Tensor, pages: Tensor, row_pages: Tensor, ends: Tensor, private: Tensor
    ) -> None:
        """Rows of the given slots, up to the widths asked for, into the caller's tensors.

        Args:
            slots: [S] int64.
            pages, row_pages, ends, private: [S, width] int32, contiguous, written.
        """
        for source, target in (
            (self.pages, pages),
            (self.row_pages, row_pages),
            (self.ends, ends),
            (self.private, private),
        ):
            torch.index_select(source[:, : target.shape[1]], 0, slots, out=target)
