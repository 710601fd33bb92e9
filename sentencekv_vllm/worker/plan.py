# SPDX-License-Identifier: Apache-2.0
"""The sparse part of one step, planned once and used by every layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..messages import Int32s, SparseRows
from ..ops.layer_ops import DecodeOutputs
from ..types import SparseBatch
from .graphs import Graphs
from .transfer import Tallies


@dataclass(frozen=True)
class StepPlan:
    """Rows, tables and buffers of the step's sparse requests, on the device.

    One for each run of layers in which no request's budget changes: one in all for most steps.

    Tensors that are no request's rows but the device's have S rows or more: those behind the
    requests' are no-ops.
    """

    step: int
    layers: range  # that have these budgets
    batch: SparseBatch
    rows: Tensor  # [S] int64: the requests' rows in the batch, none else
    tokens: Tensor  # [>= S] int64: positions of their query tokens in the batch
    slots: Tensor  # [S] int64
    host_slots: Int32s  # [S], -1 once the request has ended
    seq_lens: Tensor  # [S] int32: tokens attended to
    out: DecodeOutputs
    tallies: Tallies  # what `out` adds up
    unranked: npt.NDArray[
        np.bool_
    ]  # [S] attends to all of its working set, or to none of the history
    running: Tensor | None  # [S] bool: ranks by the running mean query; None: nobody does
    previous: Tensor | None  # [S] bool: ranks by the query of the step before; None: nobody does
    restarts: (
        Tensor  # [S] bool: the query of this step is the first of the mean, or has none before
    )
    ahead: bool  # all rows rank by queries that are there before the step
    estimates: Tensor | None  # [S] bool: what is left out is estimated; None: nobody's is
    graphs: Graphs  # of work on these tensors

    @property
    def variant(self) -> tuple[bool, ...]:
        """What of a layer's work depends on the plan beyond its tensors: part of a graph's key."""
        absent = (x is None for x in (self.running, self.previous, self.estimates))
        unranked = bool(self.unranked.all())
        return unranked, self.ahead, self.batch.token_codes_only, *absent


def table_width(rows: SparseRows, budget: Int32s, block_size: int) -> int:
    """Columns that the widest table of `head_tables` needs."""
    num_blocks = -(-rows.seq_lens // block_size)
    return int((rows.history_lo + budget + num_blocks - rows.history_hi).max())


def head_tables(
    block_table: Tensor,
    private: Tensor,
    history_lo: Tensor,
    history_hi: Tensor,
    columns: Tensor,
    seq_lens: Tensor,
    width: int,
    block_size: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor]:
    """Per-KV-head block tables `[sinks | selected | recent]` and their lengths.

    The selected columns hold the working set's blocks, in order: those of a compacted history;
    each layer writes its own choice over those of the others. Columns of freed blocks are never
    read. Nothing here waits for the device.

    Args:
        block_table: [S, max_blocks] int32, vLLM's rows of these requests.
        private: [S, R] int32: the working sets.
        history_lo, history_hi: [S] int32: first block after the sinks and of the recent window.
        columns: [S] int32: blocks attended to in place of the history.
        seq_lens: [S] int32: tokens of the request, this step's included.
        width: see `table_width`.

    Returns:
        tables [S, H, W] int32 of head-block ids `b * H + h`; lengths [S] int32.
    """
    lo, hi, budget = (t.long()[:, None] for t in (history_lo, history_hi, columns))
    num_blocks = (seq_lens.long()[:, None] + block_size - 1) // block_size
    column = torch.arange(width, device=block_table.device)[None]
    recent = column - (lo + budget) + hi
    source = torch.where(column < lo, column, recent.minimum(num_blocks - 1))
    selected = (column >= lo) & (column < lo + budget)
    place = (column - lo).clamp(0, private.shape[1] - 1)
    blocks = torch.where(
        selected, private.gather(1, place), block_table.gather(1, source.clamp(min=0))
    )
    heads = torch.arange(num_kv_heads, device=block_table.device)
    tables = (blocks.long()[:, None] * num_kv_heads + heads[:, None]).to(torch.int32)
    lengths = (lo + budget - hi).squeeze(1) * block_size + seq_lens
    return tables, lengths.to(torch.int32)
