# SPDX-License-Identifier: Apache-2.0
"""Plans a step from tensors made for it; the CPU's way, where tables are shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..messages import Int32s, SparseRows
from ..ops.layer_ops import DecodeOutputs, LayerOps
from ..types import Geometry, QueryKind
from .graphs import Graphs
from .plan import StepPlan, head_tables, table_width
from .tables import Tables
from .transfer import Array, Tallies, Totals, upload

STAGES = ("score", "select", "resolve", "swap")


@dataclass(frozen=True)
class StepFacts:
    """What a step's plan is made of."""

    step: int
    rows: SparseRows
    found: Array  # [S] rows of the requests in the batch
    tokens: Array  # [S] positions of their query tokens in the batch
    block_table: Tensor  # [>= num_reqs, max_blocks] int32, vLLM's
    layers: range
    attended: Int32s  # [S] blocks per KV head, in place of the history, in these layers


class Planner(Protocol):
    def plan(self, facts: StepFacts) -> StepPlan:
        """Everything that `facts.layers` share; the ops are told of the step.

        Plans of one step that are for other layers have tensors of their own.
        """


def attended_blocks(tables: Tables, rows: SparseRows) -> list[tuple[range, Int32s]]:
    """Blocks that each row attends to, per KV head, in place of its history: [S] for each run of
    layers in which they are the same."""
    history = rows.history_hi - rows.history_lo
    opening = np.where(rows.restarts, tables.options["opening_blocks"][rows.slots], 0)
    num_layers = tables.layer_blocks.shape[1]
    if not tables.differs_by_layer[rows.slots].any():
        budget = np.maximum(tables.options["budget_blocks"][rows.slots], opening)
        return [(range(num_layers), np.minimum(budget, history).astype(np.int32))]
    budgets = np.maximum(tables.layer_blocks[rows.slots], opening[:, None])
    by_layer = np.minimum(budgets, history[:, None]).astype(np.int32)
    changes = np.flatnonzero((by_layer[:, 1:] != by_layer[:, :-1]).any(0)) + 1
    bounds = [0, *changes.tolist(), num_layers]
    return [(range(a, b), by_layer[:, a].copy()) for a, b in pairwise(bounds)]


def ranks_ahead(previous: Array, rows: SparseRows, unranked: Array) -> bool:
    """All rows rank, if at all, by queries of the step before."""
    return bool((previous & ~rows.restarts).all() and not unranked.all())


class HostPlanner:
    """Makes new tensors for every step; on the CPU most of them share the tables' memory."""

    def __init__(
        self, geometry: Geometry, tables: Tables, ops: LayerOps, device: torch.device
    ) -> None:
        self._geometry, self._tables, self._ops, self._device = geometry, tables, ops, device

    def plan(self, facts: StepFacts) -> StepPlan:
        rows, geometry, options = facts.rows, self._geometry, self._tables.options
        batch = self._tables.batch(rows, facts.step, facts.attended)
        query_kind = options["query_kind"][rows.slots]
        running = query_kind == QueryKind.RUNNING_MEAN
        previous = query_kind == QueryKind.PREVIOUS
        unranked = options["unranked"][rows.slots].astype(bool)
        estimates = options["estimates"][rows.slots].astype(bool)
        arrays = [facts.found, facts.tokens, rows.slots.astype(np.int64), rows.seq_lens]
        arrays += [running, previous, rows.restarts, rows.history_hi, facts.attended]
        index, tokens, slots, seq_lens, is_running, is_previous, restarts, history_hi, columns = (
            upload(arrays, self._device)
        )
        is_estimating = upload([estimates], self._device)[0] if estimates.any() else None
        tables, lengths = head_tables(
            facts.block_table.index_select(0, index),
            batch.private_blocks,
            batch.history_lo,
            history_hi,
            columns,
            seq_lens,
            table_width(rows, facts.attended, geometry.block_size),
            geometry.block_size,
            geometry.num_kv_heads,
        )
        totals = Totals(len(rows.slots), len(STAGES), self._device)
        self._ops.set_step(facts.step)
        self._ops.begin_step(batch)
        return StepPlan(
            step=facts.step,
            layers=facts.layers,
            batch=batch,
            rows=index,
            tokens=tokens,
            slots=slots,
            host_slots=rows.slots.copy(),
            seq_lens=lengths,
            out=DecodeOutputs(tables, totals.hits, totals.misses, totals.coverage, totals.stage_ns),
            tallies=Tallies(totals, len(rows.slots)),
            unranked=unranked,
            running=is_running if running.any() else None,
            previous=is_previous if previous.any() else None,
            restarts=restarts,
            ahead=ranks_ahead(previous, rows, unranked),
            estimates=is_estimating,
            graphs=Graphs(None),
        )
