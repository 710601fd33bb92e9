# SPDX-License-Identifier: Apache-2.0
"""What a worker knows of the tracked requests: one table row a request."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from ..messages import Int32s, RequestUpdate, SparseRows
from ..ops.rank_blocks import retention_factor
from ..types import IndexKind, SparseBatch
from .transfer import upload

CPU = torch.device("cpu")
WIDTH_STEP = 64  # columns; few distinct widths, so that GPU kernels are compiled few times
OPTION_COLUMNS = (
    "index_kind",
    "reduce",
    "budget_blocks",
    "seed",
    "query_kind",
    "unranked",
    "opening_blocks",
    "estimates",
)


@dataclass(frozen=True)
class NewSentences:
    """Sentences of one request that can be indexed now; see `ops.index_sentences`."""

    rows: Int32s  # [n]
    spans: Int32s  # [n, 2]
    span_blocks: Int32s  # [n, C]
    kind: IndexKind
    estimates: bool  # their mean values are kept, too

    def tokens(self, block_size: int) -> list[npt.NDArray[np.int64]]:
        """`GroupTokens` of these sentences: blocks, places and lengths."""
        firsts, lengths = self.spans.astype(np.int64).T
        sentence = np.repeat(np.arange(len(lengths)), lengths)
        before = np.cumsum(lengths) - lengths
        token = np.arange(lengths.sum()) + np.repeat(firsts - before, lengths)
        blocks = self.span_blocks[sentence, token // block_size].astype(np.int64)
        return [blocks, token % block_size, lengths]


def rounded_up(columns: int) -> int:
    return -(-columns // WIDTH_STEP) * WIDTH_STEP


class GrowingTable:
    """[num_slots, width] int32 with appended rows; the width doubles on demand."""

    def __init__(self, num_slots: int) -> None:
        self.values = np.zeros((num_slots, WIDTH_STEP), np.int32)
        self.counts = np.zeros(num_slots, np.int32)

    def append(self, slot: int, items: list[int] | Int32s) -> None:
        first = int(self.counts[slot])
        last = first + len(items)
        if last > self.values.shape[1]:
            width = max(rounded_up(last), 2 * self.values.shape[1])
            wider = np.zeros((len(self.values), width), np.int32)
            wider[:, : self.values.shape[1]] = self.values
            self.values = wider
        self.values[slot, first:last] = items
        self.counts[slot] = last

    def of(self, slot: int) -> Int32s:
        return self.values[slot, : self.counts[slot]]

    def gather(self, slots: Int32s) -> Int32s:
        """[S, at least the widest] of the given rows; what lies behind a row's count is stale."""
        return self.values[slots, : max(WIDTH_STEP, rounded_up(int(self.counts[slots].max())))]


class Tables:
    """All tracked requests, by slot."""

    def __init__(
        self,
        num_slots: int,
        working_set_blocks: int,
        block_size: int,
        rows_per_page: int,
        device: torch.device = CPU,
        num_layers: int = 1,
    ) -> None:
        self.device = device  # of the batches; the tables themselves stay on the host
        self.block_size = block_size
        self.rows_per_page = rows_per_page
        self.blocks = GrowingTable(num_slots)  # block j, as it was when it was copied out
        self.pages = GrowingTable(num_slots)
        self.row_pages = GrowingTable(num_slots)
        self.ends = GrowingTable(num_slots)
        self.owners = np.zeros(num_slots, np.int64)  # counts the requests that had the slot
        self.changes = np.zeros(num_slots, np.int64)  # counts what `apply` and `drop` have done
        self.num_indexed = np.zeros(num_slots, np.int32)  # sentences with an index entry
        self.private = np.zeros((num_slots, max(1, working_set_blocks)), np.int32)
        self.staging: dict[int, Int32s] = {}  # private blocks of visitors
        self.retention = np.zeros(num_slots, np.float32)
        self.layer_blocks = np.zeros((num_slots, num_layers), np.int32)  # `budget_blocks` of each
        self.differs_by_layer = np.zeros(num_slots, np.bool_)
        self.options = {name: np.zeros(num_slots, np.int32) for name in OPTION_COLUMNS}
        self._batch: tuple[tuple[bytes, ...], SparseBatch] | None = None

    def drop(self, slot: int) -> None:
        for table in (self.blocks, self.pages, self.row_pages, self.ends):
            table.counts[slot] = 0
        self.num_indexed[slot] = 0
        self.staging.pop(slot, None)
        self.owners[slot] += 1
        self.changes[slot] += 1
        self._batch = None

    def apply(self, update: RequestUpdate) -> NewSentences | None:
        """Take the facts in; the blocks named must be copied out before the next batch."""
        slot, n = update.slot, self.block_size
        self._batch = None
        self.changes[slot] += 1
        if update.options is not None:
            self.retention[slot] = update.options.retention
            if update.options.index_kind == IndexKind.TOKEN_CODES:
                self.retention[slot] = retention_factor(update.options.retention)
            by_layer = update.options.layer_blocks
            self.layer_blocks[slot] = by_layer or update.options.budget_blocks
            self.differs_by_layer[slot] = bool(by_layer)
            for name, column in self.options.items():
                column[slot] = getattr(update.options, name)
        self.blocks.append(slot, update.block_ids)
        self.pages.append(slot, update.page_ids)
        self.row_pages.append(slot, update.row_pages)
        self.ends.append(slot, update.sentence_ends)
        if update.private_blocks:
            self.private[slot, : len(update.private_blocks)] = update.private_blocks
        if update.staging is not None:
            self.staging[slot] = np.asarray(update.staging, np.int32)
        ends = self.ends.of(slot)
        first = int(self.num_indexed[slot])
        last = int(np.searchsorted(ends, int(self.pages.counts[slot]) * n, side="right"))
        if last == first:
            return None
        self.num_indexed[slot] = last
        return self._new_sentences(slot, first, last, ends)

    def indexed_sentences(self, slot: int) -> tuple[Int32s, Int32s]:
        """Rows and ends of a request's sentences that have an index entry."""
        count = int(self.num_indexed[slot])
        return self._rows_of(slot, np.arange(count)), self.ends.of(slot)[:count]

    def _rows_of(self, slot: int, sentences: npt.NDArray[np.intp]) -> Int32s:
        m = self.rows_per_page
        return self.row_pages.of(slot)[sentences // m] * m + sentences % m

    def _new_sentences(self, slot: int, first: int, last: int, ends: Int32s) -> NewSentences:
        n = self.block_size
        rows = self._rows_of(slot, np.arange(first, last))
        stops = ends[first:last]
        starts = np.concatenate((ends[first - 1 : first] if first else [0], stops[:-1]))
        starts = starts.astype(np.int32)
        first_block = starts // n
        columns = first_block[:, None] + np.arange(int(((stops - 1) // n - first_block).max()) + 1)
        blocks = self.blocks.of(slot)
        span_blocks = np.where(
            columns <= ((stops - 1) // n)[:, None], blocks[np.minimum(columns, len(blocks) - 1)], -1
        )
        spans = np.stack((starts - first_block * n, stops - starts), 1)
        return NewSentences(
            rows.astype(np.int32),
            spans.astype(np.int32),
            span_blocks.astype(np.int32),
            IndexKind(self.options["index_kind"][slot]),
            bool(self.options["estimates"][slot]),
        )

    def batch(self, rows: SparseRows, step: int, attended: Int32s) -> SparseBatch:
        """The step's rows as tensors; rebuilt only when something but the step has changed.

        Args:
            attended: [S] blocks per KV head, in place of the history.
        """
        # What is compacted, or not attended to at all, is no history to the ops.
        unranked = self.options["unranked"][rows.slots].astype(bool)
        (budget,) = upload([np.where(unranked, 0, attended).astype(np.int32)], self.device)
        key = (rows.slots.tobytes(), rows.history_lo.tobytes(), rows.history_hi.tobytes())
        if self._batch is not None and self._batch[0] == key:
            return replace(self._batch[1], step=step, budget_blocks=budget)
        slots = rows.slots
        history_hi = np.where(unranked, rows.history_lo, rows.history_hi)
        columns = {
            "pages": self.pages.gather(slots),
            "num_pages": self.pages.counts[slots],
            "row_pages": self.row_pages.gather(slots),
            "sentence_ends": self.ends.gather(slots),
            "num_sentences": self.num_indexed[slots],
            "history_lo": rows.history_lo,
            "history_hi": history_hi,
            "private_blocks": self.private[slots],
            "index_kind": self.options["index_kind"][slots],
            "reduce": self.options["reduce"][slots],
            "retention": self.retention[slots],
            "seed": self.options["seed"][slots],
        }
        tensors = upload(list(columns.values()), self.device)
        named = dict(zip(columns, tensors, strict=True))
        batch = SparseBatch(**named, step=step, budget_blocks=budget, token_codes_only=False)
        self._batch = (key, batch)
        return batch
