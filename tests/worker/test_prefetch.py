# SPDX-License-Identifier: Apache-2.0
"""Ranking ahead of the layers selects the same as ranking in them, and races with nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sentencekv_vllm.types import QueryKind
from sentencekv_vllm.worker.copy_stream import SideStream
from sentencekv_vllm.worker.prefetch import Prefetch
from sentencekv_vllm.worker.query_previous import QueryPrevious
from sentencekv_vllm.worker.warm_up import warm_up

from .fake_graph import FakeGraph
from .fake_streams import FakeStreams
from .test_device_planner import CPU, GEOMETRY, LAYERS, SLOTS, SteppedReference, life, make_runtime

PREVIOUS = QueryKind.PREVIOUS


class CountingPrefetch(Prefetch):
    started = 0

    def start(self, plan, layers, rank):
        self.started += 1
        super().start(plan, layers, rank)


def counts(runtime):
    return {k: n for k, n in runtime.take_counters().items() if not k.endswith("_ns")}


def prefetch(kind=CountingPrefetch, new_graph=None, streams=None):
    return kind(CPU, LAYERS, new_graph, streams or FakeStreams())


@pytest.mark.parametrize("layer_share", [1, 2])
@pytest.mark.parametrize("new_graph", [None, FakeGraph])
def test_outputs_counts_and_state_are_those_of_ranking_inline(new_graph, layer_share):
    for seed in range(2):
        inline = make_runtime(True, new_graph, layer_share)
        expected, state, _ = life(inline, 16, seed, PREVIOUS)
        ahead = prefetch(new_graph=new_graph)
        runtime = make_runtime(True, new_graph, layer_share, prefetch=ahead)
        outputs, left, _ = life(runtime, 16, seed, PREVIOUS)
        assert 3 < ahead.started < 16, "some steps have rows that restart"
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        assert all(torch.equal(left[name], state[name]) for name in state)
        assert counts(runtime) == counts(inline)


def test_steps_with_other_rows_rank_inline():
    ahead = prefetch()
    runtime = make_runtime(True, FakeGraph, prefetch=ahead)
    expected, _, _ = life(make_runtime(True, FakeGraph), 20)
    ranked_ahead = []
    outputs, _, _ = life(
        runtime, 20, attended=lambda plan, layer, _: ranked_ahead.append(plan.ahead)
    )
    assert LAYERS * ahead.started == sum(ranked_ahead) < len(ranked_ahead) // 2
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


class TouchingOps(SteppedReference):
    """Notes what an op touches, and on which stream."""

    def __init__(self, streams, workspace="workspace"):
        super().__init__()
        self.streams, self.pools, self.workspace = streams, [], workspace
        self.touch = streams.touch
        index_pages, index_sentences = self.index_pages, self.index_sentences

        def pages(pools, block_ids, page_ids, *rest):
            self.touch("page", page_ids, written=True)
            index_pages(pools, block_ids, page_ids, *rest)

        def sentences(pools, rows, *rest):
            self.touch("row", rows // GEOMETRY.rows_per_page, written=True)
            index_sentences(pools, rows, *rest)

        self.index_pages, self.index_sentences = pages, sentences

    def set_step(self, step):
        self.touch(self.workspace, [0], written=True)
        super().set_step(step)

    def begin_step(self, batch):
        self.touch(self.workspace, [0], written=True)
        if self.workspace == "workspace":  # the batch and the totals of the plan
            for kind in ("step", "totals"):
                self.touch(kind, [0], written=True)
        super().begin_step(batch)

    def decode_layer(self, geometry, pools, batch, query, out):
        for s, count in enumerate(batch.num_sentences.tolist()):
            rows = -(-count // GEOMETRY.rows_per_page)
            self.touch("row", batch.row_pages[s, :rows], written=False)
        self._select(pools, batch, out)
        super().decode_layer(geometry, pools, batch, query, out)

    def reuse_selection(self, pools, batch, out):
        self._select(pools, batch, out)
        super().reuse_selection(pools, batch, out)

    def _select(self, pools, batch, out):
        layer = next(i for i, known in enumerate(self.pools) if known.cache is pools.cache)
        for s, count in enumerate(batch.num_pages.tolist()):
            self.touch("page", batch.pages[s, :count], written=False)
        self.touch(self.workspace, [0], written=True)
        if self.workspace == "workspace":
            self.touch("step", [0], written=False)
            self.touch("totals", [0], written=True)
        flags = [pools.kept.data_ptr(), pools.page_kept.data_ptr()]
        self.touch("flags", flags, written=True)
        self.touch("residency", [layer], written=True)
        self.touch("tables", [out.head_tables.data_ptr()], written=True)
        self.touch("slot", slots_of(batch, layer), written=True)


def slots_of(batch, layer):
    return [(layer, b) for b in batch.private_blocks.flatten().unique().tolist() if b]


class TouchingQueries(QueryPrevious):
    def __init__(self, streams):
        super().__init__(GEOMETRY, SLOTS + 1)
        self.touch = streams.touch

    def of(self, layer, slots):
        self.touch("query", [(layer, s) for s in slots.tolist()], written=False)
        return super().of(layer, slots)

    def keep(self, layer, slots, query):
        self.touch("query", [(layer, s) for s in slots.tolist()], written=True)
        super().keep(layer, slots, query)


def races(kind, layer_share=1, query_kind=PREVIOUS, warm=False):
    """Of a life on streams that record; `warm`: working sets are filled ahead, too."""
    streams = FakeStreams()
    ops, warm_ops = TouchingOps(streams), TouchingOps(streams, "warm workspace")
    ahead = prefetch(kind, FakeGraph, streams)
    runtime = make_runtime(
        True, FakeGraph, layer_share, prefetch=ahead, ops=ops, warm_ops=warm_ops if warm else None
    )
    runtime.observations._queries.normal_()
    warm_ops.pools = runtime.pools.layers
    runtime._copies = SideStream(CPU, streams)
    runtime.query_previous = TouchingQueries(streams)
    ops.pools = runtime.pools.layers
    empty_slots, take_report = runtime.pools.empty_slots, runtime.take_report

    def emptied(blocks):
        streams.touch("residency", range(LAYERS), written=True)
        empty_slots(blocks)

    def reported():
        streams.touch("totals", [0], written=False)
        return take_report()

    def attended(plan, layer, tables):
        streams.touch("tables", [tables.data_ptr()], written=False)
        streams.touch("slot", slots_of(plan.batch, layer), written=False)

    runtime.pools.empty_slots, runtime.take_report = emptied, reported
    life(runtime, 16, 2, query_kind, attended)
    kinds = {name for name, _, _ in streams.accesses}
    assert kinds == {
        *("page", "row", "workspace", "step", "totals"),
        *("residency", "flags", "tables", "slot", "query"),
        *(["warm workspace"] if warm else []),
    }
    return {name for (name, *_), _ in streams.races()}


@pytest.mark.parametrize("layer_share", [1, 2])
def test_no_wait_is_missing(layer_share):
    assert races(Prefetch, layer_share) == set()


class NoFirstWait(Prefetch):
    def queue(self, layers, work):
        self._side.wait_stream = lambda stream: None
        super().queue(layers, work)


class NoWaitForLayers(Prefetch):
    def wait(self, layer):
        return None


class OneTable(Prefetch):
    def _tables(self, plan):
        made = super()._tables(plan)
        return replace(made, outs=[made.outs[0]] * LAYERS)


@pytest.mark.parametrize(
    ("broken", "raced"),
    [
        (NoFirstWait, {"page", "row", "slot", "query", "workspace", "residency", "totals"}),
        (NoWaitForLayers, {"slot", "query", "tables", "totals"}),
        (OneTable, {"tables"}),
    ],
)
def test_each_rule_is_needed(broken, raced):
    assert raced <= races(broken)


@pytest.mark.parametrize("query_kind", [PREVIOUS, None])
def test_filling_working_sets_races_with_nothing(query_kind):
    assert races(Prefetch, query_kind=query_kind, warm=True) == set()
    assert races(NoWaitForLayers, query_kind=query_kind, warm=True) >= {"residency", "slot"}


@pytest.mark.parametrize("query_kind", [PREVIOUS, None])
def test_filled_working_sets_change_hits_and_nothing_else(query_kind):
    cold = make_runtime(True)
    warm = make_runtime(True, FakeGraph, prefetch=prefetch(), warm_ops=SteppedReference())
    warm.observations._queries.normal_(generator=torch.Generator().manual_seed(3))
    (expected, state, _), (outputs, left, _) = (
        life(runtime, 16, 2, query_kind) for runtime in (cold, warm)
    )
    pairs = [(a, b) for a, b in zip(expected, outputs, strict=True) if a.is_floating_point()]
    assert pairs and all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(state[flags], left[flags]) for flags in ("kept", "page_kept"))
    before, after = counts(cold), counts(warm)
    filled = after.pop("warm_start_head_blocks")
    assert filled > 0 and after["misses"] < before["misses"]
    assert after["hits"] + after["misses"] == before["hits"] + before["misses"]
    swapped = (after["misses"] + filled) * warm.pools.head_block_bytes
    assert after["swap_in_bytes"] == swapped


def test_layers_are_ranked_beside_the_attention_of_those_before():
    streams = FakeStreams()
    ops = TouchingOps(streams)
    runtime = make_runtime(True, prefetch=prefetch(Prefetch, streams=streams), ops=ops)
    ops.pools = runtime.pools.layers
    attentions = []

    def attended(plan, layer, tables):
        if plan.ahead and layer == 0:
            attentions.append(len(streams.after))
            streams.touch("attention", [0], written=False)

    life(runtime, 16, 2, PREVIOUS, attended)
    first = attentions[0]
    swaps = [i for i, (kind, at, _) in enumerate(streams.accesses[:first])
             if kind == "residency" and at == 1]  # fmt: skip
    assert swaps and swaps[-1] not in streams.after[first]


def test_the_made_up_request_ranks_its_only_layer_ahead():
    FakeGraph.made.clear()
    ahead = prefetch(new_graph=FakeGraph)
    runtime = make_runtime(True, FakeGraph, prefetch=ahead)
    tables = []

    def attend(plan, query):
        runtime.await_layer(plan, 0)
        work = lambda: tables.append(runtime.rank(plan, 0, query))  # noqa: E731
        plan.graphs.run((0, *plan.variant), work)

    warm_up(runtime, attend)
    assert len(tables) == 24 and ahead.started == 3
    assert not runtime.query_previous.has(1)
