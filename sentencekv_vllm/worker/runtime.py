# SPDX-License-Identifier: Apache-2.0
"""The worker side: performs the scheduler's messages and ranks in every layer."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial, reduce

import numpy as np
import torch
from torch import Tensor

from ..messages import (
    Int32s,
    ObservedRows,
    RequestUpdate,
    SparseRows,
    StepMessage,
    StepReport,
    VisitRows,
)
from ..ops.estimate_unselected import Attended
from ..ops.layer_ops import DecodeOutputs, LayerOps
from ..ops.load import Sizes
from ..ops.mean_values import GroupTokens, write_mean_values
from ..ops.token_layout import TokenLayout
from ..types import Basis, Geometry, QueryKind
from .copy_stream import CopyStream, copy_stream
from .device_planner import DevicePlanner
from .graphs import Graph
from .observations import Observations, Observed
from .plan import StepPlan
from .planner import STAGES, HostPlanner, Planner, StepFacts, attended_blocks, ranks_ahead
from .pools import Pools
from .prefetch import Prefetch
from .query_mean import QueryMean
from .query_previous import QueryPrevious
from .settling import Settling
from .tables import Tables
from .transfer import Array, upload
from .visit_stream import VisitStream
from .visits import Visits
from .warm_start import Guess, WarmStart

STEPS_IN_FLIGHT = 2  # vLLM schedules a step once the one before the last has returned


class Runtime:
    """State of one worker process, shared by the connector and all attention layers."""

    def __init__(
        self,
        geometry: Geometry,
        caches: Sequence[Tensor],
        layout: TokenLayout,
        num_pages: int,
        num_slots: int,
        working_set_blocks: int,
        ops: LayerOps,
        layer_names: Sequence[str],
        copies: CopyStream | None = None,
        layer_share: int = 1,
        observation_window: int = 0,
        sizes: Sizes | None = None,
        new_graph: Callable[[], Graph] | None = None,
        prefetch: Prefetch | None = None,
        warm_ops: LayerOps | None = None,
        bases: Sequence[Basis] | None = None,
        visits: VisitStream | None = None,
    ) -> None:
        """Allocate everything.

        Args:
            geometry: this worker's shapes.
            caches: vLLM's KV cache of each layer, [B, H, N, 2D].
            layout: where the tokens lie in a head-block.
            num_pages: host pages.
            num_slots: requests tracked at once.
            working_set_blocks: private blocks of a request.
            ops: implementation of the device functions.
            layer_names: in the order of `caches`.
            layer_share: consecutive layers that attend to what the first of them selects.
            observation_window: last prompt tokens whose queries may vote.
            copies: where copy-out is queued; by default what suits the device of `caches`.
            sizes: the largest step, for tensors that are allocated once; None: every step makes
                its own, which is as good where no device is told of them.
            new_graph: records what a step does on such tensors; None: nothing is recorded.
            prefetch: ranks ahead of the layers where the queries allow it; None: each layer ranks
                when its turn comes.
            warm_ops: fill the working sets of requests that turn sparse; None: they start empty.
            bases: in which each layer's keys are coded; None: the fixed one.
            visits: orders the copies of histories that visit the device; None: nobody's does.
        """
        self.geometry = geometry
        self.max_pages = num_pages if sizes is None else sizes.max_pages  # of one request
        self.layer_index = {name: i for i, name in enumerate(layer_names)}
        self.ops = ops
        self.pools = Pools(geometry, num_pages, caches, bases)
        self.device = caches[0].device
        self.tables = Tables(
            num_slots,
            working_set_blocks,
            geometry.block_size,
            geometry.rows_per_page,
            self.device,
            geometry.num_layers,
        )
        self._planner: Planner = (
            HostPlanner(geometry, self.tables, ops, self.device)
            if sizes is None
            else DevicePlanner(geometry, self.tables, ops, sizes, new_graph)
        )
        self._visits: Visits | None = None
        if visits is not None:
            self._visits = Visits(self.pools, self.tables, caches, visits, layer_names)
        # One row more than slots, for the rows of a step that are nobody's.
        self.query_mean = QueryMean(geometry, num_slots + 1)
        self.query_previous = QueryPrevious(geometry, num_slots + 1)
        self.counters: Counter[str] = Counter()
        self._layer_share = layer_share
        self._prefetch = prefetch
        self._records = new_graph is not None
        self._copies = copies or copy_stream(self.device)
        self.layout = layout
        self._key_offset = layout.keys.flatten().to(torch.int32)  # as `read_keys` takes it
        self.observations = Observations(
            geometry, num_slots, observation_window, caches[0].dtype, self.device
        )
        self._warm_start: WarmStart | None = None
        if warm_ops is not None:
            self._warm_start = WarmStart(
                geometry,
                self.pools,
                self.tables,
                self.observations,
                warm_ops,
                layer_share,
            )
        self._guesses: deque[Guess] = deque()
        self._updates: list[RequestUpdate] = []  # of the step, until it is planned
        self._queued = -1  # the last step with work ahead of its layers
        self._rows: SparseRows | None = None
        self._watched: ObservedRows | None = None
        self._visiting: VisitRows | None = None
        self._order: dict[str, int] = {}
        self._step = -1
        self._plans: tuple[StepPlan, ...] = ()
        self._planned = -1  # the last step that was planned
        self._unsettled: deque[tuple[StepPlan, ...]] = deque()
        # All ranks must report the same steps, so a step is booked after a fixed number of
        # steps, by which it is done, and not as soon as its counts happen to be there.
        self._lag = STEPS_IN_FLIGHT if self.device.type == "cuda" else 0
        self._report: StepReport | None = None

    @property
    def has_sparse_rows(self) -> bool:
        """The step being run has rows to decode sparsely; not before its message, not after
        `end_step`."""
        return self._rows is not None

    @property
    def acts_in_layers(self) -> bool:
        """The step being run has rows to decode sparsely, queries to keep, or visits."""
        parts = (self._rows, self._watched, self._visiting)
        return any(part is not None for part in parts)

    def is_recordable(self, num_requests: int) -> bool:
        """The step being run can be one graph: every row of the batch is sparse, and no layer
        waits for what another stream has queued.

        Args:
            num_requests: of the batch, each with one token.
        """
        rows = self._rows
        if not self._records or rows is None or self._watched is not None:
            return False
        if self._visiting is not None:
            return False
        if len(rows.slots) < num_requests or (self._warm_start and rows.restarts.any()):
            return False
        options = self.tables.options
        previous = options["query_kind"][rows.slots] == QueryKind.PREVIOUS
        unranked = options["unranked"][rows.slots].astype(bool)
        return self._prefetch is None or not ranks_ahead(previous, rows, unranked)

    def apply(self, message: StepMessage) -> None:
        """Perform a step's message; a second call with the same message does nothing."""
        if message.step == self._step:
            return
        self._step, self._rows, self._plans = message.step, message.sparse, ()
        self._watched, self._updates = message.observed, message.updates
        self._visiting = message.visits
        self._order = {}
        for slot in message.dropped:
            self.tables.drop(slot)
            for plan, *_ in self._unsettled:  # the slot's next owner gets no counts of this one
                plan.host_slots[plan.host_slots == slot] = -1
        if message.updates:
            self._update(message)
        if message.sparse is not None or message.frees or message.visits is not None:
            self._copies.join()

    def _update(self, message: StepMessage) -> None:
        started = time.perf_counter_ns()
        sentences = [s for u in message.updates if (s := self.tables.apply(u)) is not None]
        if not self.geometry.vectors_per_row:
            sentences = []  # nobody reads rows
        blocks = np.asarray([b for u in message.updates for b in u.block_ids], np.int32)
        pages = np.asarray([p for u in message.updates for p in u.page_ids], np.int32)
        arrays = [blocks, pages]
        for s in sentences:
            arrays += [s.rows, s.spans, s.span_blocks]
        estimated = [i for i, s in enumerate(sentences) if s.estimates]
        tokens = [a for i in estimated for a in sentences[i].tokens(self.geometry.block_size)]
        with self._copies.writing():
            for update in message.updates:
                if update.private_blocks:
                    self.pools.empty_slots(update.private_blocks)
            block_ids, page_ids, *spans = upload(arrays, self.device)
            places = upload(tokens, self.device) if tokens else []
            for pools in self.pools.layers:
                if len(blocks):
                    self.ops.index_pages(pools, block_ids, page_ids, self._key_offset)
                for i, s in enumerate(sentences):
                    rows, ranges, span_blocks = spans[3 * i : 3 * i + 3]
                    self.ops.index_sentences(
                        pools, rows, ranges, span_blocks, self._key_offset, s.kind
                    )
                for j, i in enumerate(estimated):
                    groups = GroupTokens(*places[3 * j : 3 * j + 3])
                    write_mean_values(pools, spans[3 * i], groups, self.layout)
            settled = [u for u in message.updates if u.settled is not None]
            if settled:
                settling = Settling(self.geometry, self.layout, self.observations, self.ops)
                for update in settled:
                    settling.add(update, self.tables)
                for layer, pools in enumerate(self.pools.layers):
                    settling.settle(layer, pools)
        self.counters["swap_out_bytes"] += len(blocks) * self.pools.page_bytes
        if self.device.type == "cpu":  # elsewhere the host's clock says nothing
            self.counters["offload_ns"] += time.perf_counter_ns() - started

    def set_batch_order(self, request_ids: Sequence[str]) -> None:
        """The step's requests in the order of the batch, where the runner tells."""
        self._order = {request_id: row for row, request_id in enumerate(request_ids)}

    def plan(
        self, block_table: Tensor, slot_mapping: Tensor, last_tokens: Tensor
    ) -> tuple[StepPlan, ...]:
        """Find the step's sparse rows in the batch.

        Args:
            block_table: [>= num_reqs, max_blocks] int32.
            slot_mapping: [>= num_tokens] int64: where each token's K and V are written.
            last_tokens: [num_reqs] int64 on the CPU: position of each row's last token.

        Returns:
            Plans for consecutive runs of layers, which they cover; none where no row is sparse.
            Their rows are in the order of the batch.
        """
        if self._rows is None:
            return ()
        found = self._find(self._rows, slot_mapping, last_tokens)
        order = np.argsort(found)
        rows, found = self._rows.take(order), found[order]
        self._planned = self._step
        tokens = last_tokens.numpy()[found]
        self._plans = tuple(
            self._planner.plan(
                StepFacts(self._step, rows, found, tokens, block_table, layers, attended)
            )
            for layers, attended in attended_blocks(self.tables, rows)
        )
        for plan in self._plans:  # the ops have begun the step for all of them
            if self._prefetch is not None and plan.ahead:
                # All layers, but for the made-up request, which runs the first one alone.
                layers = filter(self._has_queries, plan.layers)
                self._prefetch.start(plan, layers, partial(self._rank_ahead, plan))
                self._queued = self._step
        self._fill_working_sets(rows)
        return self._plans

    def _fill_working_sets(self, rows: SparseRows) -> None:
        if self._warm_start is None:
            return
        for guess in self._warm_start.begin(self._step, rows, self._updates):
            self._guesses.append(guess)
            if self._prefetch is None:
                for layer in guess.layers:
                    self._warm_start.fill(guess, layer)
            else:
                self._prefetch.queue(guess.layers, partial(self._warm_start.fill, guess))
                self._queued = self._step

    def _has_queries(self, layer: int) -> bool:
        return self.query_previous.has(layer - layer % self._layer_share)

    def _rank_ahead(self, plan: StepPlan, layer: int, out: DecodeOutputs) -> None:
        leads = not layer % self._layer_share
        query = self.query_previous.of(layer, plan.slots) if leads else None
        self._select(plan, layer, query, out)

    def _find(
        self, rows: SparseRows | ObservedRows | VisitRows, slot_mapping: Tensor, last_tokens: Tensor
    ) -> Array:
        """The requests' rows in the batch."""
        if self._order:
            return np.asarray([self._order[r] for r in rows.request_ids], np.int64)
        return self._find_by_tail(rows.tail_blocks, slot_mapping, last_tokens)

    def _find_by_tail(
        self, tail_blocks: Int32s, slot_mapping: Tensor, last_tokens: Tensor
    ) -> Array:
        """Rows by the block they write to, which one request owns; reads `slot_mapping` back."""
        written = slot_mapping.index_select(0, last_tokens.to(slot_mapping.device))
        tails = (written // self.geometry.block_size).cpu().numpy()
        order = np.argsort(tails, kind="stable")
        found = order[np.searchsorted(tails, tail_blocks, sorter=order).clip(0, len(order) - 1)]
        assert (tails[found] == tail_blocks).all(), "a request is not in the batch"
        return found

    def observed(self, slot_mapping: Tensor, last_tokens: Tensor) -> Observed | None:
        """The step's voting tokens, arguments as in `plan`; None where there are none."""
        rows = self._watched
        if rows is None:
            return None
        self._planned = self._step
        first = last_tokens.numpy()[self._find(rows, slot_mapping, last_tokens)] - rows.offsets
        place = rows.slots * self.observations.window + rows.places
        before = np.cumsum(rows.counts) - rows.counts
        index = np.arange(rows.counts.sum())  # start + (index - before) runs through each row
        starts = (np.repeat(start - before, rows.counts) for start in (first, place))
        return Observed(*upload([(s + index).astype(np.int64) for s in starts], self.device))

    def visits(
        self, block_table: Tensor, slot_mapping: Tensor, last_tokens: Tensor
    ) -> Visits | None:
        """Histories that visit in this step, arguments as in `plan`; None where there are none.

        Args:
            block_table: [R, W] int32, of the dense rows.
        """
        rows = self._visiting
        if rows is None:
            return None
        assert self._visits is not None, "no room for visits was promised"
        self._planned = self._step
        self._visits.begin(rows, self._find(rows, slot_mapping, last_tokens), block_table)
        return self._visits

    def await_layer(self, plan: StepPlan, layer: int) -> None:
        """Before `rank`, and outside a graph's work: wait for what was queued ahead."""
        if self._prefetch is not None and self._queued == plan.step:
            self._prefetch.wait(layer)

    def rank(self, plan: StepPlan, layer: int, query: Tensor) -> Tensor:
        """Select, resolve and swap in; the layer's tables [S, H, W] are ready after it.

        Args:
            plan: the step's for this layer.
            query: [S, Hq, D] contiguous, the current queries.
        """
        if plan.unranked.all():
            return plan.out.head_tables
        leads = not layer % self._layer_share
        if self._prefetch is not None and plan.ahead:
            if leads:
                self.query_previous.keep(layer, plan.slots, query)
            return self._prefetch.head_tables(plan, layer)
        ranking = self._ranking_query(plan, layer, query) if leads else None
        self._select(plan, layer, ranking, plan.out)
        return plan.out.head_tables

    def _select(self, plan: StepPlan, layer: int, query: Tensor | None, out: DecodeOutputs) -> None:
        """By the query that ranks; None: what the layer before selected."""
        pools = self.pools.layers[layer]
        if query is None:
            self.ops.reuse_selection(pools, plan.batch, out)
        else:
            self.ops.decode_layer(self.geometry, pools, plan.batch, query, out)

    def estimate(
        self,
        plan: StepPlan,
        layer: int,
        query: Tensor,
        tables: Tensor,
        output: Tensor,
        lse: Tensor | None = None,
        softcap: float = 0.0,
    ) -> None:
        """After the layer's attention: add the estimate of what it left out, where wanted.

        Args:
            query: [S, Hq, D] contiguous, the current queries.
            tables: [S, H, W] int32, from `rank`.
            output: [S, Hq, D], what attention has written; changed in place.
            lse: [S, Hq] float32 of that attention; None: it is worked out anew.
            softcap: of the logits; 0: none.
        """
        if plan.estimates is not None:
            attended = Attended(tables, plan.seq_lens, self.layout, lse, softcap)
            self.ops.estimate_unselected(
                self.geometry,
                self.pools.layers[layer],
                plan.batch,
                plan.estimates,
                query,
                attended,
                output,
            )

    def _ranking_query(self, plan: StepPlan, layer: int, query: Tensor) -> Tensor:
        ranking = query
        if plan.previous is not None:
            before = self.query_previous.exchange(layer, plan.slots, query, plan.restarts)
            ranking = torch.where(plan.previous[:, None, None], before, query)
        if plan.running is not None:
            mean = self.query_mean.add(layer, plan.slots, query, plan.restarts)
            ranking = torch.where(plan.running[:, None, None], mean, ranking.float())
        return ranking

    def end_step(self) -> None:
        """The forward is queued: from here on no row is sparse and nobody votes.

        Raises:
            RuntimeError: the step's sparse rows were never planned, so attention read blocks
                that are no longer theirs.
        """
        if self.acts_in_layers and self._planned != self._step:
            raise RuntimeError(
                f"step {self._step} has sparse rows, voting tokens or visits, and the forward "
                "ran without them: a CUDA graph of the whole model was replayed, or this vLLM "
                "builds metadata at another time. Start with --compilation-config "
                '\'{"cudagraph_mode": "PIECEWISE"}\' and report this.'
            )
        self._rows, self._watched, self._visiting = None, None, None

    def take_report(self) -> StepReport | None:
        """What the last booked step selected, once."""
        self._settle()
        report, self._report = self._report, None
        return report

    def take_counters(self) -> dict[str, int]:
        """Counts since the last call."""
        self._settle()
        if self._visits is not None:
            self.counters["visit_bytes"] += self._visits.take_bytes()
        taken = {name: count for name, count in self.counters.items() if count}
        self.counters.clear()
        return taken

    def reset(self) -> None:
        """Forget every step and request."""
        self._copies.join()
        for slot in range(len(self.tables.num_indexed)):
            self.tables.drop(slot)
        self.pools.reset()
        self._step, self._rows, self._plans, self._report = -1, None, (), None
        self._watched, self._visiting, self._planned, self._queued = None, None, -1, -1
        self._unsettled.clear()
        self._guesses.clear()
        self.counters.clear()

    def close(self) -> None:
        """Release the swap pool's pinned memory."""
        self.pools.close()

    def _settle(self) -> None:
        """Book the steps that are done: their plans become counts, the last one a report."""
        if self._plans:
            for plan in self._plans:
                plan.tallies.start_fetch()
            self._unsettled.append(self._plans)
            for guess in self._guesses:
                if guess.step == self._plans[0].step:
                    guess.tallies.start_fetch()
            self._plans = ()
        while self._unsettled and self._unsettled[0][0].step <= self._step - self._lag:
            self._book(self._unsettled.popleft())
        while self._guesses and self._guesses[0].step <= self._step - self._lag:
            self._book_guess(self._guesses.popleft())

    def _book_guess(self, guess: Guess) -> None:
        _, misses, stage_ns, _ = guess.tallies.fetched()
        for name, elapsed in zip(STAGES, stage_ns.tolist(), strict=True):
            self.counters[f"{name}_ns"] += elapsed
        self.counters["warm_start_head_blocks"] += int(misses.sum())
        self.counters["swap_in_bytes"] += int(misses.sum()) * self.pools.head_block_bytes

    def _book(self, plans: tuple[StepPlan, ...]) -> None:
        plan = plans[0]  # the rows are the same in all
        by_plan = zip(*(p.tallies.fetched() for p in plans), strict=True)
        hits, misses, stage_ns, coverage = (reduce(np.add, column) for column in by_plan)
        for name, elapsed in zip(STAGES, stage_ns.tolist(), strict=True):
            self.counters[f"{name}_ns"] += elapsed
        num_misses = int(misses.sum())
        self.counters["hits"] += int(hits.sum())
        self.counters["misses"] += num_misses
        self.counters["swap_in_bytes"] += num_misses * self.pools.head_block_bytes
        self.counters["sparse_steps"] += 1
        shares = (coverage / self.geometry.num_layers).astype(np.float32)
        shares[plan.unranked] = np.nan
        known = shares[~np.isnan(shares)]
        self.counters["coverage_millionths"] += int(1e6 * float(known.sum()))
        self.counters["coverage_rows"] += len(known)
        self._report = StepReport(plan.host_slots, hits, misses, shares, plan.step)
