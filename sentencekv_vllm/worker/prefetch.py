# SPDX-License-Identifier: Apache-2.0
"""Ranking and swap-in ahead of the layers, on a stream of its own, where the query allows it.

Rows that rank by the query of the decode step before (`query: previous`) need nothing of the
forward at hand. In a step where all rows do, and none restarts, the work of every layer is queued
when the step is planned, layer after layer on a side stream, each into head tables of its own. A
layer of the forward waits for its event, keeps its query for the next step and attends. What is
selected is the same as inline: the same calls see the same tensors in the same order.

Five rules order it with the compute stream:

1. The side stream waits for what the compute stream holds when the step is planned. That is the
   forward of the step before, which has read the slots that swap-in overwrites and written the
   queries that rank now; the step's tables, zeroed totals and located sentences; and, by the join
   of `copy_stream`, all copies and index entries that the step may read.
2. The workspace of the ops, LRU stamps, page tables and flags of the last selection belong to one
   stream at a time: in a step of this kind only the side stream touches them after rule 1, and no
   later step begins before the compute stream has passed all events (rule 3). So ranking ahead
   and ranking inline may take turns.
3. A layer's attention, and the write of its query, come after the layer's event: its blocks are
   there, its tables written, its former query read; what estimates afterwards reads stamps and
   page table of that layer, which nobody writes then. The last event comes after all others, so a
   forward that has run has waited for all of the side stream: totals are read back, blocks of
   requests that end are given away and page contents replaced (rule 1 of `copy_stream`) after it.
4. A layer's tables are its own: the next layer is ranked while this one attends.
5. Graphs of the two streams take memory from different pools, since their replays overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops.layer_ops import DecodeOutputs
from .graphs import Graph, Graphs
from .plan import StepPlan


@dataclass(frozen=True)
class LayerTables:
    """What the layers of a plan have apart, for all steps on the plan's tensors."""

    head_tables: Tensor  # [L, S, H, W] int32
    outs: list[DecodeOutputs]  # L; they add up in the plan's totals
    graphs: Graphs


class Prefetch:
    """The side stream, and an event for each layer."""

    def __init__(
        self,
        device: torch.device,
        num_layers: int,
        new_graph: Callable[[], Graph] | None = None,
        streams: Any = torch.cuda,
    ) -> None:
        """Nothing is queued yet.

        Args:
            new_graph: see `Graphs`; its pool is shared with no other stream (rule 5).
            streams: `torch.cuda`, or what a test has in its place.
        """
        self._device, self._streams, self._new_graph = device, streams, new_graph
        self._side = streams.Stream(device)
        self._ready = [streams.Event() for _ in range(num_layers)]

    def start(
        self, plan: StepPlan, layers: Iterable[int], rank: Callable[[int, DecodeOutputs], None]
    ) -> None:
        """Queue the ranking and the swap-in of a step.

        Args:
            layers: in ascending order.
            rank: queues them for one layer, into the outputs given.
        """
        tables = self._tables(plan)
        tables.head_tables.copy_(plan.out.head_tables)  # sinks and recent window, for all layers

        def work(layer: int) -> None:
            key = (layer, plan.batch.token_codes_only)
            tables.graphs.run(key, partial(rank, layer, tables.outs[layer]))

        self.queue(layers, work)

    def queue(self, layers: Iterable[int], work: Callable[[int], None]) -> None:
        """Have the layers' work done beside the forward; each layer is waited for by itself.

        Args:
            layers: in ascending order.
            work: queues a layer's on the current stream, which is the side stream.
        """
        self._side.wait_stream(self._streams.current_stream(self._device))  # rule 1
        with self._streams.stream(self._side):
            for layer in layers:
                work(layer)
                self._ready[layer].record(self._side)

    def wait(self, layer: int) -> None:
        """What follows on the compute stream sees the layer's tables and blocks (rule 3)."""
        self._streams.current_stream(self._device).wait_event(self._ready[layer])

    def head_tables(self, plan: StepPlan, layer: int) -> Tensor:
        """[S, H, W] int32, ready after `wait`."""
        return self._tables(plan).outs[layer].head_tables

    def _tables(self, plan: StepPlan) -> LayerTables:
        def make() -> LayerTables:
            out, count = plan.out, len(self._ready)
            tables = out.head_tables.new_empty(count, *out.head_tables.shape)
            outs = [replace(out, head_tables=tables[layer]) for layer in range(count)]
            return LayerTables(tables, outs, Graphs(self._new_graph))

        made: LayerTables = plan.graphs.once("layer tables", make)
        return made
