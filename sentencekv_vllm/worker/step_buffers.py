# SPDX-License-Identifier: Apache-2.0
"""Tensors of a step that stay where they are, for all steps of about the same size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..types import Geometry, SparseBatch
from .graphs import Graphs
from .plan import head_tables
from .transfer import Array, Packing, Staging, Totals

INPUTS = {  # what the host tells in every step, [S] each, in one copy
    "rows": torch.int64,
    "tokens": torch.int64,
    "slots": torch.int64,
    "num_pages": torch.int32,
    "num_sentences": torch.int32,
    "history_lo": torch.int32,
    "history_hi": torch.int32,
    "budget_blocks": torch.int32,
    "recent_lo": torch.int32,  # block
    "attended_blocks": torch.int32,
    "seq_lens": torch.int32,
    "index_kind": torch.int32,
    "reduce": torch.int32,
    "seed": torch.int32,
    "retention": torch.float32,
    "running": torch.bool,
    "previous": torch.bool,
    "restarts": torch.bool,
    "estimates": torch.bool,
}


@dataclass(frozen=True)
class StepSize:
    """A step's rows and widths, each rounded up to a power of two: few sizes, few graphs."""

    rows: int
    pages: int  # columns
    sentences: int
    width: int  # of the head tables
    max_blocks: int  # columns of vLLM's block table

    @staticmethod
    def of(
        rows: int, pages: int, sentences: int, width: int, max_blocks: int, limits: StepSize
    ) -> StepSize:
        """The size that holds so much.

        Args:
            limits: where rounding ends; widths beyond `limits.width` are rounded all the same.
        """
        assert rows <= limits.rows and pages <= limits.pages and sentences <= limits.sentences
        return StepSize(
            rows=min(power_of_two(rows), limits.rows),
            pages=min(power_of_two(max(pages, 64)), limits.pages),
            sentences=min(power_of_two(max(sentences, 64)), limits.sentences),
            width=power_of_two(max(width, 8)),
            max_blocks=max_blocks,
        )


def power_of_two(n: int) -> int:
    """The smallest that is no less."""
    return 1 << max(0, n - 1).bit_length()


class StepBuffers:
    """The persistent tensors of one size, and the graphs over them.

    Rows behind the step's own are no-ops: no sentences, nothing to select, length 0.
    """

    def __init__(
        self,
        size: StepSize,
        geometry: Geometry,
        working_set: int,
        num_stages: int,
        device: torch.device,
        graphs: Graphs,
    ) -> None:
        s, heads = size.rows, geometry.num_kv_heads
        self.size, self.graphs, self._geometry = size, graphs, geometry

        def int32s(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        packing = Packing([((s,), dtype) for dtype in INPUTS.values()])
        self._staging = Staging(packing, device)
        self._inputs = torch.zeros(packing.num_bytes, dtype=torch.uint8, device=device)
        self.inputs = dict(zip(INPUTS, packing.views(self._inputs), strict=True))
        row_pages = -(-size.sentences // geometry.rows_per_page)
        shared = ("num_pages", "num_sentences", "history_lo", "history_hi", "budget_blocks")
        options = ("index_kind", "reduce", "retention", "seed")
        batch = SparseBatch(
            pages=int32s(s, size.pages),
            row_pages=int32s(s, row_pages),
            sentence_ends=int32s(s, size.sentences),
            private_blocks=int32s(s, working_set),
            step=-1,  # set in the ops, which read it from the device
            token_codes_only=False,
            **{name: self.inputs[name] for name in (*shared, *options)},
        )
        self.batches = {only: replace(batch, token_codes_only=only) for only in (False, True)}
        self._block_table = int32s(s, size.max_blocks)
        self.head_tables = int32s(s, heads, size.width)
        self.lengths = int32s(s)
        self.totals = Totals(s, num_stages, device)

    def fill(self, columns: dict[str, Array], block_table: Tensor, null_slot: int) -> None:
        """Bring a step's facts to the device: one copy and one gather.

        Args:
            columns: [S] each, S <= size.rows, named as `INPUTS`.
            block_table: [>= num_reqs, max_blocks] int32 of the whole batch.
            null_slot: slot of the rows behind S.
        """
        count = len(columns["rows"])
        for name, place in zip(INPUTS, self._staging.next(), strict=True):
            place[:count] = columns[name]
            place[count:] = null_slot if name == "slots" else 0
        self._staging.send(self._inputs)
        torch.index_select(block_table, 0, self.inputs["rows"], out=self._block_table)

    def write_tables(self) -> None:
        """Head tables and lengths of the step, its choices still open."""
        geometry, batch = self._geometry, self.batches[False]
        tables, lengths = head_tables(
            self._block_table,
            batch.private_blocks,
            batch.history_lo,
            self.inputs["recent_lo"],
            self.inputs["attended_blocks"],
            self.inputs["seq_lens"],
            self.size.width,
            geometry.block_size,
            geometry.num_kv_heads,
        )
        self.head_tables.copy_(tables)
        self.lengths.copy_(lengths)
