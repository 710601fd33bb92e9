# SPDX-License-Identifier: Apache-2.0
"""Plans a step in persistent tensors, so that CUDA graphs can replay on them."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable

import numpy as np

from ..ops.layer_ops import DecodeOutputs, LayerOps
from ..ops.load import Sizes
from ..types import Geometry
from .device_tables import DeviceTables
from .graphs import Graph, Graphs
from .plan import StepPlan, table_width
from .planner import STAGES, StepFacts, ranks_ahead
from .slot_facts import LatestSlotFacts
from .step_buffers import StepBuffers, StepSize
from .tables import Tables
from .transfer import Tallies

MAX_SIZES = 32  # the least recently used one goes, with its graphs


class DevicePlanner:
    """A step costs one copy, one gather and one replay; the tables are on the device already."""

    def __init__(
        self,
        geometry: Geometry,
        tables: Tables,
        ops: LayerOps,
        sizes: Sizes,
        new_graph: Callable[[], Graph] | None,
    ) -> None:
        """Allocate the tables.

        Args:
            sizes: the largest step.
            new_graph: see `Graphs`.
        """
        self._geometry, self._tables, self._ops = geometry, tables, ops
        self._slot_facts = LatestSlotFacts(tables)
        self._new_graph, self._device = new_graph, sizes.device
        self._on_device = DeviceTables(tables, sizes.max_pages, sizes.max_sentences, sizes.device)
        self._limits = StepSize(sizes.max_requests, sizes.max_pages, sizes.max_sentences, 0, 0)
        # By the first layer that they are for: plans of one step share nothing.
        self._buffers: defaultdict[int, OrderedDict[StepSize, StepBuffers]]
        self._buffers = defaultdict(OrderedDict)

    def plan(self, facts: StepFacts) -> StepPlan:
        rows, slots, attended = facts.rows, facts.rows.slots, facts.attended
        known = self._slot_facts(slots)
        unranked = known.unranked
        columns = {
            **known.columns,
            "rows": facts.found,
            "tokens": facts.tokens,
            "history_lo": rows.history_lo,
            # What is compacted, or not attended to at all, is no history to the ops.
            "history_hi": np.where(unranked, rows.history_lo, rows.history_hi),
            "budget_blocks": np.where(unranked, 0, attended),
            "recent_lo": rows.history_hi,
            "attended_blocks": attended,
            "seq_lens": rows.seq_lens,
            "restarts": rows.restarts,
        }
        buffers = self._buffers_of(
            facts.layers.start,
            StepSize.of(
                len(slots),
                known.max_pages,
                known.max_sentences,
                table_width(rows, attended, self._geometry.block_size),
                facts.block_table.shape[1],
                self._limits,
            ),
        )
        self._on_device.update(slots)
        buffers.fill(columns, facts.block_table, self._on_device.null_slot)
        self._ops.set_step(facts.step)
        buffers.graphs.run("step", lambda: self._start(buffers))
        inputs, totals, count = buffers.inputs, buffers.totals, len(slots)
        return StepPlan(
            step=facts.step,
            layers=facts.layers,
            batch=buffers.batches[known.token_codes_only],
            rows=inputs["rows"][:count],
            tokens=inputs["tokens"],
            slots=inputs["slots"],
            host_slots=slots.copy(),
            seq_lens=buffers.lengths,
            out=DecodeOutputs(
                buffers.head_tables, totals.hits, totals.misses, totals.coverage, totals.stage_ns
            ),
            tallies=Tallies(totals, count, shared=True),
            unranked=unranked,
            running=inputs["running"] if known.any_running else None,
            previous=inputs["previous"] if known.any_previous else None,
            restarts=inputs["restarts"],
            ahead=ranks_ahead(columns["previous"], rows, unranked),
            estimates=inputs["estimates"] if known.any_estimates else None,
            graphs=buffers.graphs,
        )

    def _start(self, buffers: StepBuffers) -> None:
        batch = buffers.batches[False]
        self._on_device.gather(
            buffers.inputs["slots"],
            batch.pages,
            batch.row_pages,
            batch.sentence_ends,
            batch.private_blocks,
        )
        buffers.write_tables()
        buffers.totals.zero()
        self._ops.begin_step(batch)

    def _buffers_of(self, first_layer: int, size: StepSize) -> StepBuffers:
        known = self._buffers[first_layer]
        buffers = known.get(size)
        if buffers is None:
            if len(known) == MAX_SIZES:
                known.popitem(last=False)
            working_set = self._tables.private.shape[1]
            buffers = known[size] = StepBuffers(
                size,
                self._geometry,
                working_set,
                len(STAGES),
                self._device,
                Graphs(self._new_graph),
            )
        known.move_to_end(size)
        return buffers
