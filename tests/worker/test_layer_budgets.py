# SPDX-License-Identifier: Apache-2.0
"""Requests whose budget differs by layer: what each layer attends to, and what is booked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_graph import FakeGraph
from fake_streams import FakeStreams

from sentencekv_vllm.messages import (
    DecodeOptions,
    ObservedRows,
    RequestUpdate,
    SettledPrompt,
    SparseRows,
    StepMessage,
)
from sentencekv_vllm.ops.layer_ops import ReferenceOps
from sentencekv_vllm.ops.load import Sizes
from sentencekv_vllm.ops.sparse_decode import sparse_decode
from sentencekv_vllm.ops.token_layout import TokenLayout
from sentencekv_vllm.ops.votes import count_votes, elect_tokens
from sentencekv_vllm.types import Fate, Geometry, IndexKind, QueryKind, Reduce, Settlement
from sentencekv_vllm.worker.prefetch import Prefetch
from sentencekv_vllm.worker.runtime import Runtime

N, D, HEADS, GROUP, LAYERS, WINDOW = 8, 16, 2, 2, 4, 6
BLOCKS, WORKING_SET = 90, 7
LENGTH, LO, HI = 109, 1, 12  # tokens of every request, 14 blocks; its history in blocks
GEOMETRY = Geometry(LAYERS, HEADS, GROUP, D, N, rows_per_page=2, scale=D**-0.5, code_width=D)
TIERS, MEAN = (6, 5, 3, 2), 4
VOTES = Settlement(Fate.COMPACT, window=WINDOW, kernel=3)
PLANNERS = [False, True]  # on tensors of its own; on persistent ones


class SteppedReference(ReferenceOps):
    """The definition, told of the step as kernels in a graph are."""

    def set_step(self, step):
        self.step = step

    def decode_layer(self, geometry, pools, batch, query, out):
        super().decode_layer(geometry, pools, replace(batch, step=self.step), query, out)

    def reuse_selection(self, pools, batch, out):
        super().reuse_selection(pools, replace(batch, step=self.step), out)


def make_runtime(persistent, layer_share=1, prefetch=None):
    generator = torch.Generator().manual_seed(0)
    caches = [torch.randn(BLOCKS, HEADS, N, 2 * D, generator=generator) for _ in range(LAYERS)]
    keys = torch.arange(N * D).view(N, D)
    return Runtime(
        GEOMETRY,
        caches,
        TokenLayout(keys, keys + N * D),
        num_pages=60,
        num_slots=4,
        working_set_blocks=WORKING_SET,
        ops=SteppedReference(),
        layer_names=[str(i) for i in range(LAYERS)],
        layer_share=layer_share,
        prefetch=prefetch,
        observation_window=WINDOW,
        sizes=Sizes(GEOMETRY, torch.device("cpu"), 4, 20, 60, WORKING_SET) if persistent else None,
        new_graph=FakeGraph if persistent else None,
    )


def options(**changes):
    values = {
        "index_kind": int(IndexKind.TOKEN_CODES),
        "reduce": int(Reduce.SOFTMAX_MEAN),
        "retention": 1.0,
        "query_kind": int(QueryKind.CURRENT),
        "budget_blocks": MEAN,
        "seed": 0,
    }
    return DecodeOptions(**(values | changes))


def blocks_of(slot):
    return [*range(1 + 14 * slot, 15 + 14 * slot)]


def private_of(slot):
    return [*range(58 + 8 * slot, 58 + 8 * slot + WORKING_SET)]


def recalled(slot, **changes):
    """A request with everything copied out."""
    pages = [*range(14 * slot, 14 * slot + 13)]
    ends = np.arange(5, 13 * N + 1, 5, dtype=np.int32)
    return RequestUpdate(
        slot, options(**changes), blocks_of(slot)[:13], pages, pages, ends, private_of(slot)
    )


def compacted(slot, tiers=TIERS, **votes):
    settlement = replace(VOTES, **votes)
    chosen = options(settlement=settlement, layer_blocks=tiers, block_groups=True)
    prompt = SettledPrompt(settlement, blocks_of(slot), LENGTH, LO, HI, MEAN, tiers)
    private = private_of(slot)[: chosen.largest_budget]
    return RequestUpdate(slot, chosen, [], [], [], np.empty(0, np.int32), private, prompt)


def sparse_rows(slots, restart=False):
    def column(values):
        return np.asarray([*values], np.int32)

    count = len(slots)
    return SparseRows(
        column(slots),
        column(blocks_of(s)[-1] for s in slots),
        column([LO] * count),
        column([HI] * count),
        column([LENGTH] * count),
        np.full(count, restart),
        [str(s) for s in slots],
    )


def step(runtime, slots, updates=(), seed=0):
    """One decode step: its plans, and by layer the outputs [S, Hq, D] and the tables."""
    number = runtime._step + 1
    rows = sparse_rows(slots, bool(updates))
    runtime.apply(StepMessage(number, [], list(updates), rows, frees=True))
    runtime.set_batch_order([str(s) for s in slots])
    table = torch.tensor([blocks_of(s) for s in slots], dtype=torch.int32)
    plans = runtime.plan(table, torch.empty(0), torch.arange(len(slots)))
    assert [layer for plan in plans for layer in plan.layers] == [*range(LAYERS)]
    outputs, tables = [], []
    for layer in range(LAYERS):
        plan = next(p for p in plans if layer in p.layers)
        count, width = len(slots), len(plan.tokens)
        query = torch.zeros(width, HEADS * GROUP, D)
        for row, slot in enumerate(slots):  # the same whoever else is in the batch
            generator = torch.Generator().manual_seed(1000 * seed + 10 * slot + layer)
            query[row] = 3 * torch.randn(HEADS * GROUP, D, generator=generator)
        held = plan.graphs.once("query", lambda query=query: torch.zeros_like(query))
        held.copy_(query)
        runtime.await_layer(plan, layer)
        ahead = runtime._prefetch is not None and plan.ahead
        plan.graphs.run(
            (layer, *plan.variant),
            lambda plan=plan, layer=layer, held=held: runtime.rank(plan, layer, held),
        )
        key, value = runtime.pools.layers[layer].cache.view(BLOCKS, HEADS, 2 * N, D).chunk(2, 2)
        out = runtime._prefetch.head_tables(plan, layer) if ahead else plan.out.head_tables
        result = sparse_decode(held, key, value, out, plan.seq_lens, GEOMETRY.scale)[0]
        outputs.append(result[:count].clone())
        tables.append(out[:count].clone())
    return plans, outputs, tables


def observe(runtime, slot):
    """The voting tokens' queries, [LAYERS, WINDOW, Hq, D]."""
    generator = torch.Generator().manual_seed(70 + slot)
    query = torch.randn(LAYERS, WINDOW, HEADS * GROUP, D, generator=generator)
    ones = np.ones(1, np.int32)
    rows = ObservedRows(
        slot * ones, 9 * ones, (WINDOW - 1) * ones, WINDOW * ones, 0 * ones, [str(slot)]
    )
    runtime.apply(StepMessage(runtime._step + 1, observed=rows))
    runtime.set_batch_order([str(slot)])
    found = runtime.observed(torch.empty(0), torch.tensor([WINDOW - 1]))
    for layer in range(LAYERS):
        runtime.observations.put(layer, query[layer], found)
    return query


def tokens_of(cache, blocks, head):
    flat = cache[torch.tensor(blocks), head].flatten(1)
    return flat[:, : N * D].reshape(-1, D), flat[:, N * D :].reshape(-1, D)


def selected_pages(runtime, layer, table, budget):
    """Pages of the history's columns, by KV head; every one must be the request's."""
    slots = table[:, LO : LO + budget].long() // HEADS
    return [runtime.pools.layers[layer].slot_page[slots[h], h].tolist() for h in range(HEADS)]


def attention(cache, slot, query, blocks):
    """Dense attention of one row to the given blocks of a request, by KV head."""
    outputs = []
    for h in range(HEADS):
        keys, values = tokens_of(cache, blocks_of(slot), h)
        tokens = [t for b in blocks[h] for t in range(b * N, min(b * N + N, LENGTH))]
        group = slice(h * GROUP, (h + 1) * GROUP)
        outputs.append(
            (GEOMETRY.scale * query[group] @ keys[tokens].T).softmax(-1) @ values[tokens]
        )
    return torch.cat(outputs)


@pytest.mark.parametrize("persistent", PLANNERS)
@pytest.mark.parametrize("kind", QueryKind)
def test_each_layer_attends_to_as_many_blocks_as_it_is_given(persistent, kind):
    runtime = make_runtime(persistent)
    before = [pools.cache.clone() for pools in runtime.pools.layers]
    update = recalled(1, layer_blocks=TIERS, query_kind=int(kind))
    for number in range(4):
        plans, outputs, tables = step(runtime, [1], [] if number else [update], seed=number)
        assert len(plans) == 4
        for layer, budget in enumerate(TIERS):
            pages = selected_pages(runtime, layer, tables[layer][0], budget)
            chosen = [[page - 14 for page in mine] for mine in pages]
            assert all(len({*mine}) == budget for mine in chosen)
            assert all(LO <= block < HI for mine in chosen for block in mine)
            recent = [*range(LO), *range(HI, 14)]
            generator = torch.Generator().manual_seed(1000 * number + 10 + layer)
            query = 3 * torch.randn(HEADS * GROUP, D, generator=generator)
            wanted = attention(before[layer], 1, query, [recent + mine for mine in chosen])
            torch.testing.assert_close(outputs[layer][0], wanted, rtol=1e-4, atol=1e-5)
        report = runtime.take_report()
        assert report.hits[0] + report.misses[0] == HEADS * sum(TIERS), "one step, all layers"
        assert 0 < report.coverage[0] <= 1
    counted = runtime.take_counters()
    assert counted["sparse_steps"] == 4 and counted["hits"] > 0


@pytest.mark.parametrize("persistent", PLANNERS)
def test_a_compacted_history_holds_each_layers_own_number_of_elected_tokens(persistent):
    runtime = make_runtime(persistent)
    window = observe(runtime, 0)
    before = [pools.cache.clone() for pools in runtime.pools.layers]
    for number in range(3):
        _, outputs, _ = step(runtime, [0], [] if number else [compacted(0)], seed=number)
        for layer, budget in enumerate(TIERS):
            generator = torch.Generator().manual_seed(1000 * number + layer)
            query = 3 * torch.randn(HEADS * GROUP, D, generator=generator)
            for h in range(HEADS):
                group = slice(h * GROUP, (h + 1) * GROUP)
                keys, values = tokens_of(before[layer], blocks_of(0), h)
                votes = count_votes(window[layer][:, group], keys[:LENGTH], GEOMETRY.scale, VOTES)
                kept = elect_tokens(votes[LO * N : HI * N], budget * N) + LO * N
                seen = torch.cat((torch.arange(LO * N), kept, torch.arange(HI * N, LENGTH)))
                wanted = (GEOMETRY.scale * query[group] @ keys[seen].T).softmax(-1) @ values[seen]
                torch.testing.assert_close(outputs[layer][0, group], wanted, rtol=1e-4, atol=1e-5)
    report = runtime.take_report()
    assert not report.hits.any() and not report.misses.any() and np.isnan(report.coverage).all()


def test_layers_of_a_group_with_different_budgets_elect_for_themselves():
    apart, together = make_runtime(False), make_runtime(False)
    for runtime, group in ((apart, 1), (together, 4)):
        observe(runtime, 0)
        step(runtime, [0], [compacted(0, (5, 5, 3, 3), layer_group=group)])
    for layer, same in enumerate((True, False, True, False)):
        caches = [r.pools.layers[layer].cache[private_of(0)] for r in (apart, together)]
        assert torch.equal(*caches) == same, "a border leads a new group"


@pytest.mark.parametrize("persistent", PLANNERS)
@pytest.mark.parametrize("layer_share", [1, 2])
def test_a_batch_of_all_kinds_is_each_request_alone(persistent, layer_share):
    """Uniform, tiered with other borders, compacted: none is told of the others."""
    halves = (6, 6, 2, 2)
    updates = {
        0: compacted(0, halves),
        1: recalled(1, layer_blocks=halves if layer_share == 2 else (5, 5, 5, 1)),
        2: recalled(2, query_kind=int(QueryKind.PREVIOUS)),
    }

    def serve(slots):
        runtime = make_runtime(persistent, layer_share)
        observe(runtime, 0)
        found, counts = [], []
        for number in range(4):
            news = [] if number else [updates[s] for s in slots]
            plans, outputs, _ = step(runtime, slots, news, seed=number)
            found.append((len(plans), outputs))
            report = runtime.take_report()
            counts.append(report.hits + report.misses)
        return found, counts

    together, counted = serve([0, 1, 2])
    assert {plans for plans, _ in together} == {2 if layer_share == 2 else 3}
    for slot in range(3):
        alone, counts = serve([slot])
        assert alone[0][0] == (1 if slot == 2 else 2), "a uniform request has one plan"
        for (_, mixed), (_, single) in zip(together, alone, strict=True):
            for layer in range(LAYERS):
                torch.testing.assert_close(
                    mixed[layer][slot], single[layer][0], rtol=1e-5, atol=1e-6
                )
        assert [c[slot] for c in counted] == [c[0] for c in counts]
    uniform = HEADS * LAYERS * MEAN
    assert [c[2] for c in counted] == [uniform] * 4


def test_plans_of_a_step_share_no_persistent_tensors():
    runtime = make_runtime(True)
    plans, _, _ = step(runtime, [1, 2], [recalled(1, layer_blocks=(5, 5, 3, 3)), recalled(2)])
    assert [plan.layers for plan in plans] == [range(2), range(2, 4)]
    first, second = (
        {
            t.data_ptr()
            for t in (
                p.batch.pages,
                p.batch.budget_blocks,
                p.tokens,
                p.seq_lens,
                p.out.head_tables,
                p.out.hits,
            )
        }  # fmt: skip
        for p in plans
    )
    assert not first & second and plans[0].graphs is not plans[1].graphs
    again, _, _ = step(runtime, [2])
    assert [plan.layers for plan in again] == [range(4)]


def test_budgets_that_the_history_cuts_to_the_same_need_one_plan():
    runtime = make_runtime(False)
    runtime.apply(StepMessage(1, [], [recalled(1, layer_blocks=TIERS)], sparse_rows([1])))
    rows = sparse_rows([1])
    rows.history_hi[:] = LO + min(TIERS)
    runtime.apply(StepMessage(2, sparse=rows))
    runtime.set_batch_order(["1"])
    table = torch.tensor([blocks_of(1)], dtype=torch.int32)
    (plan,) = runtime.plan(table, torch.empty(0), torch.zeros(1, dtype=torch.int64))
    assert plan.layers == range(LAYERS) and plan.batch.budget_blocks.tolist() == [min(TIERS)]


@pytest.mark.parametrize("layer_share", [1, 2])
def test_ranking_ahead_of_the_layers_selects_what_ranking_in_them_does(layer_share):
    def serve(prefetch):
        runtime = make_runtime(True, layer_share, prefetch)
        previous = {"query_kind": int(QueryKind.PREVIOUS)}
        updates = [recalled(1, layer_blocks=(5, 5, 3, 3), **previous), recalled(2, **previous)]
        found = []
        for number in range(5):
            plans, outputs, _ = step(runtime, [1, 2], [] if number else updates, seed=number)
            report = runtime.take_report()
            found.append((torch.stack(outputs), report.hits.tolist(), report.misses.tolist()))
            assert [plan.ahead for plan in plans] == [number > 0] * 2
        return found

    cpu = torch.device("cpu")
    ahead = serve(Prefetch(cpu, LAYERS, FakeGraph, FakeStreams()))
    for (output, *counts), (inline, *expected) in zip(ahead, serve(None), strict=True):
        assert torch.equal(output, inline) and counts == expected
