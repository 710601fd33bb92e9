# SPDX-License-Identifier: Apache-2.0
"""The worker side: performs the scheduler's messages and ranks in every layer."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..messages import SparseRows, StepMessage, StepReport
from ..ops.layer_ops import DecodeOutputs, LayerOps
from ..ops.rotation import rotation
from ..types import Geometry
from .plan import StepPlan, head_tables
from .pools import Pools
from .query_mean import QueryMean
from .tables import Tables

STAGES = ("score", "select", "resolve", "swap")


class Runtime:
    """State of one worker process, shared by the connector and all attention layers."""

    def __init__(
        self,
        geometry: Geometry,
        caches: Sequence[Tensor],
        key_offset: Tensor,
        num_pages: int,
        num_slots: int,
        working_set_blocks: int,
        ops: LayerOps,
        layer_names: Sequence[str],
    ) -> None:
        """Allocate everything.

        Args:
            geometry: this worker's shapes.
            caches: vLLM's KV cache of each layer, [B, H, N, 2D].
            key_offset: [N * D] int32, see `ops.index_pages.read_keys`.
            num_pages: host pages.
            num_slots: requests tracked at once.
            working_set_blocks: private blocks of a request.
            ops: implementation of the device functions.
            layer_names: in the order of `caches`.
        """
        self.geometry = geometry
        self.layer_index = {name: i for i, name in enumerate(layer_names)}
        self.ops = ops
        self.pools = Pools(geometry, num_pages, caches)
        self.tables = Tables(
            num_slots, working_set_blocks, geometry.block_size, geometry.rows_per_page
        )
        self.query_mean = QueryMean(geometry, num_slots)
        self.counters: Counter[str] = Counter()
        self.rotation = rotation(geometry.head_dim).to(caches[0].device)
        self._key_offset = key_offset
        self._rows: SparseRows | None = None
        self._step = -1
        self._plan: StepPlan | None = None
        self._report: StepReport | None = None

    @property
    def has_sparse_rows(self) -> bool:
        """The step being run has rows to decode sparsely."""
        return self._rows is not None

    def apply(self, message: StepMessage) -> None:
        """Perform a step's message; a second call with the same message does nothing."""
        if message.step == self._step:
            return
        self._step, self._rows, self._plan = message.step, message.sparse, None
        for slot in message.dropped:
            self.tables.drop(slot)
        if message.updates:
            self._update(message)

    def _update(self, message: StepMessage) -> None:
        started = time.perf_counter_ns()
        sentences = [s for u in message.updates if (s := self.tables.apply(u)) is not None]
        for update in message.updates:
            if update.private_blocks:
                self.pools.empty_slots(update.private_blocks)
        blocks = torch.tensor([b for u in message.updates for b in u.block_ids], dtype=torch.int32)
        pages = torch.tensor([p for u in message.updates for p in u.page_ids], dtype=torch.int32)
        batches = [
            tuple(torch.from_numpy(a) for a in (s.rows, s.spans, s.span_blocks)) for s in sentences
        ]
        for pools in self.pools.layers:
            if len(blocks):
                self.ops.index_pages(pools, blocks, pages, self._key_offset, self.rotation)
            for rows, spans, span_blocks in batches:
                self.ops.index_sentences(pools, rows, spans, span_blocks, self._key_offset)
        self.counters["swap_out_bytes"] += len(blocks) * self.pools.page_bytes
        self.counters["offload_ns"] += time.perf_counter_ns() - started

    def plan(
        self, tail_blocks: Tensor, block_table: Tensor, seq_lens: Tensor, tokens: Tensor
    ) -> StepPlan | None:
        """Find the step's sparse rows in the batch; None where there are none.

        Args:
            tail_blocks: [num_reqs] block that each row's last token is written to.
            block_table: [num_reqs, max_blocks] int32.
            seq_lens: [num_reqs] int32.
            tokens: [num_reqs] position of each row's last token in the batch.
        """
        rows = self._rows
        if rows is None:
            return None
        tails = tail_blocks.numpy()
        order = np.argsort(tails, kind="stable")
        found = order[
            np.searchsorted(tails, rows.tail_blocks, sorter=order).clip(0, len(order) - 1)
        ]
        assert (tails[found] == rows.tail_blocks).all(), "a sparse request is not in the batch"
        index = torch.from_numpy(found)
        batch = self.tables.batch(rows, self._step)
        tables, lengths = head_tables(
            block_table[index],
            batch,
            seq_lens[index],
            self.geometry.block_size,
            self.geometry.num_kv_heads,
        )
        count = len(found)
        running = self.tables.options["running_mean_query"][rows.slots].astype(bool)
        self._plan = StepPlan(
            batch=batch,
            rows=index,
            tokens=tokens[index].long(),
            slots=torch.from_numpy(rows.slots).long(),
            seq_lens=lengths,
            out=DecodeOutputs(
                head_tables=tables,
                hits=torch.zeros(count, dtype=torch.int64),
                misses=torch.zeros(count, dtype=torch.int64),
                coverage=torch.zeros(count),
                stage_ns=torch.zeros(len(STAGES), dtype=torch.int64),
            ),
            running=torch.from_numpy(running) if running.any() else None,
            starts=torch.from_numpy(rows.starts_sentence),
        )
        return self._plan

    def rank(self, plan: StepPlan, layer: int, query: Tensor) -> Tensor:
        """Score, select, resolve and swap in; the layer's tables [S, H, W] are ready after it.

        Args:
            query: [S, Hq, D] contiguous, the current queries.
        """
        if plan.running is not None:
            mean = self.query_mean.add(layer, plan.slots, query, plan.starts)
            query = torch.where(plan.running[:, None, None], mean, query.float())
        self.ops.decode_layer(
            self.geometry, self.pools.layers[layer], plan.batch, query, self.rotation, plan.out
        )
        return plan.out.head_tables

    def take_report(self) -> StepReport | None:
        """What the last step selected, once."""
        self._settle()
        report, self._report = self._report, None
        return report

    def take_counters(self) -> dict[str, int]:
        """Counts since the last call."""
        self._settle()
        taken = {name: count for name, count in self.counters.items() if count}
        self.counters.clear()
        return taken

    def _settle(self) -> None:
        """Book a finished step: its plan becomes a report and counts."""
        plan, self._plan = self._plan, None
        if plan is None:
            return
        out = plan.out
        for name, elapsed in zip(STAGES, out.stage_ns.tolist(), strict=True):
            self.counters[f"{name}_ns"] += elapsed
        misses = int(out.misses.sum())
        self.counters["hits"] += int(out.hits.sum())
        self.counters["misses"] += misses
        head_block_bytes = self.geometry.head_block_numel * self.pools.host.element_size()
        self.counters["swap_in_bytes"] += misses * head_block_bytes
        self.counters["sparse_steps"] += 1
        coverage = out.coverage / self.geometry.num_layers
        known = coverage[~coverage.isnan()]
        self.counters["coverage_millionths"] += int(1e6 * float(known.sum()))
        self.counters["coverage_rows"] += len(known)
        self._report = StepReport(
            slots=plan.slots.numpy().astype(np.int32),
            hits=out.hits.numpy(),
            misses=out.misses.numpy(),
            coverage=coverage.nan_to_num(0.0).numpy(),
        )
