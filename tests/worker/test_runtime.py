# SPDX-License-Identifier: Apache-2.0
"""The worker performs messages: copy-out, plans, swap-in, counts."""

from __future__ import annotations

import pytest
import torch
from small_runtime import (
    BUDGET,
    GROUP,
    HEADS,
    PROMPT_BLOCKS,
    D,
    N,
    attend,
    make_runtime,
    plan_of,
    plans_of,
    rows,
    turning_sparse,
)

from sentencekv_vllm.host_format import HostDtype, HostFormat
from sentencekv_vllm.messages import StepMessage
from sentencekv_vllm.types import IndexKind, QueryKind, Reduce


def decode(runtime, steps=6, poison=True):
    """One request, its freed blocks overwritten after the copy."""
    blocks = list(range(1, PROMPT_BLOCKS + 1))
    working_set = runtime.tables.private.shape[1]
    private = list(range(20, 20 + working_set))
    outputs = []
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        if step == 0:
            runtime.apply(turning_sparse(0, blocks, [*range(30, 30 + len(blocks))], private))
            if poison:
                for pools in runtime.pools.layers:
                    pools.cache[2 : PROMPT_BLOCKS - 1] = float("nan")
                    pools.cache[private] = float("nan")
                    pools.cache[0] = float("nan")
        else:
            runtime.apply(StepMessage(step + 1, sparse=rows([0], [PROMPT_BLOCKS])))
        plan = plan_of(runtime, [PROMPT_BLOCKS], [blocks])
        for layer in range(2):
            query = 3 * torch.randn(1, HEADS * GROUP, D, generator=generator)
            outputs.append(attend(runtime, plan, layer, query))
        runtime.take_report()
    return torch.stack(outputs)


@pytest.mark.parametrize("working_set", [BUDGET, 2 * BUDGET, 11])
def test_the_working_set_never_changes_the_output(working_set):
    expected = decode(make_runtime(BUDGET), poison=False)
    runtime = make_runtime(working_set)
    result = decode(runtime)
    assert not result.isnan().any(), "nothing freed, unused or null is read"
    assert torch.equal(result, expected)


def test_a_larger_working_set_swaps_less():
    misses = []
    for working_set in (BUDGET, 11):
        runtime = make_runtime(working_set)
        decode(runtime, steps=10)
        counted = runtime.take_counters()
        assert counted["hits"] + counted["misses"] == 10 * 2 * HEADS * BUDGET
        assert counted["swap_in_bytes"] == counted["misses"] * 2 * N * D * 4
        misses.append(counted["misses"])
    assert misses[1] < misses[0]


def test_copy_out_is_byte_for_byte_and_counted():
    runtime = make_runtime(BUDGET)
    before = [pools.cache.clone() for pools in runtime.pools.layers]
    blocks, pages = [7, 3, 9, *range(40, 51)], [5, 6, 4, *range(10, 21)]
    runtime.apply(turning_sparse(1, blocks, pages, [20, 21, 22]))
    for pools, cache in zip(runtime.pools.layers, before, strict=True):
        assert torch.equal(pools.host[pages], cache[blocks])
        assert torch.equal(pools.cache, cache)
    assert runtime.take_counters()["swap_out_bytes"] == len(blocks) * 2 * HEADS * 2 * N * D * 4
    assert runtime.take_counters() == {}


@pytest.mark.parametrize(
    ("host_dtype", "error"), [(HostDtype.INT8, 0.01), (HostDtype.FP8, 0.06), (HostDtype.INT4, 0.2)]
)
def test_pages_of_lower_precision_are_counted_as_what_they_weigh(host_dtype, error):
    form = HostFormat(host_dtype, numel=2 * N * D, group_size=32, element_bytes=4)
    exact, runtime = make_runtime(BUDGET), make_runtime(BUDGET, host_format=form)
    expected, result = decode(exact), decode(runtime)
    assert 0 < (result - expected).norm() / expected.norm() < error
    counted = runtime.take_counters()
    assert counted["misses"] == exact.take_counters()["misses"], "the index is of exact keys"
    assert counted["swap_in_bytes"] == counted["misses"] * form.head_block_bytes
    assert counted["swap_out_bytes"] == PROMPT_BLOCKS * 2 * HEADS * form.head_block_bytes


def test_a_message_that_comes_twice_is_performed_once():
    runtime = make_runtime(BUDGET)
    message = turning_sparse(0, [*range(1, 15)], [*range(14)], [20, 21, 22])
    runtime.apply(message)
    runtime.apply(message)
    assert runtime.tables.pages.counts[0] == 14


def test_rows_are_found_by_the_block_they_write_wherever_they_are():
    runtime = make_runtime(BUDGET)
    first, second = [*range(1, 15)], [*range(21, 35)]
    one = turning_sparse(0, first, [*range(14)], [40, 41, 42])
    two = turning_sparse(2, second, [*range(14, 28)], [43, 44, 45])
    runtime.apply(StepMessage(1, [], one.updates + two.updates, rows([0, 2], [14, 34])))
    tables = [[*range(50, 59)] + [9] * 5, second, [59] * 14, first]
    plan = plan_of(runtime, [58, 34, 59, 14], tables)
    assert plan.rows.tolist() == plan.tokens.tolist() == [1, 3], "in the order of the batch"
    assert plan.slots.tolist() == [2, 0]
    with pytest.raises(AssertionError, match="not in the batch"):
        plan_of(runtime, [58, 34, 59, 15], tables)


def test_without_sparse_rows_there_is_no_plan():
    runtime = make_runtime(BUDGET)
    runtime.apply(StepMessage(1))
    assert not runtime.has_sparse_rows
    assert plans_of(runtime, [1], [[1] * 14]) == ()
    assert runtime.take_report() is None


def test_a_report_is_given_once_with_the_steps_lookups():
    runtime = make_runtime(BUDGET)
    decode(runtime, steps=1)
    runtime.apply(StepMessage(9, sparse=rows([0], [PROMPT_BLOCKS])))
    plan = plan_of(runtime, [PROMPT_BLOCKS], [[*range(1, PROMPT_BLOCKS + 1)]])
    for layer in range(2):
        runtime.rank(plan, layer, torch.randn(1, HEADS * GROUP, D))
    report = runtime.take_report()
    assert report.slots.tolist() == [0]
    assert report.hits[0] + report.misses[0] == 2 * HEADS * BUDGET
    assert 0 < report.coverage[0] <= 1
    assert runtime.take_report() is None


def test_late_counts_are_complete_and_go_to_their_request_only():
    """As on a GPU, where a step's counts are read two steps later."""

    def reports(lag, drop_at=None):
        runtime = make_runtime(BUDGET)
        runtime._lag = lag
        blocks = [*range(1, PROMPT_BLOCKS + 1)]
        found = []
        for step in range(1, 9):
            if step == 1:
                runtime.apply(turning_sparse(0, blocks, [*range(30, 44)], [20, 21, 22]))
            elif step < 6:
                runtime.apply(StepMessage(step, sparse=rows([0], [PROMPT_BLOCKS])))
            else:
                runtime.apply(StepMessage(step, dropped=[0] if step == drop_at else []))
            if step < 6:
                plan = plan_of(runtime, [PROMPT_BLOCKS], [blocks])
                generator = torch.Generator().manual_seed(step)
                runtime.rank(plan, 0, torch.randn(1, HEADS * GROUP, D, generator=generator))
            report = runtime.take_report()
            if report is not None:
                counts = (report.hits.tolist(), report.misses.tolist())
                found.append((step, report.slots.tolist(), counts))
        return found, runtime.take_counters()

    (at_once, counted), (late, late_counted) = reports(0), reports(2)
    assert late == [(step + 2, slots, counts) for step, slots, counts in at_once]
    assert len(late) == 5
    for name in ("hits", "misses", "sparse_steps", "coverage_rows", "coverage_millionths"):
        assert late_counted[name] == counted[name]
    after_drop, _ = reports(2, drop_at=6)
    assert [slots for _, slots, _ in after_drop] == [[0], [0], [0], [-1], [-1]]


def test_pages_and_blocks_of_a_former_owner_are_no_hits():
    runtime = make_runtime(BUDGET)
    decode(runtime, steps=3, poison=False)
    for pools in runtime.pools.layers:
        pools.cache.normal_()
    # The same pages and private blocks, for another request on another slot.
    blocks, pages = [*range(1, 15)], [*range(30, 40)] + [0, 1, 2, 3]
    message = turning_sparse(1, blocks, pages, [22, 21, 20])
    runtime.apply(StepMessage(50, [0], message.updates, rows([1], [14])))
    runtime.take_counters()
    plan = plan_of(runtime, [14], [blocks])
    attend(runtime, plan, 0, torch.randn(1, HEADS * GROUP, D))
    assert int(plan.out.hits) == 0 and int(plan.out.misses) == HEADS * BUDGET


def test_only_requests_that_ask_for_it_rank_by_the_running_mean():
    def last_tables(query_kind):
        runtime = make_runtime(BUDGET)
        message = turning_sparse(
            0,
            [*range(1, 15)],
            [*range(14)],
            [20, 21, 22],
            index_kind=int(IndexKind.CENTROID),
            reduce=int(Reduce.MEAN),
            retention=0.0,
            query_kind=int(query_kind),
        )
        runtime.apply(message)
        queries = torch.randn(2, 1, HEADS * GROUP, D, generator=torch.Generator().manual_seed(5))
        for step, query in enumerate([-30 * queries[0], queries[1]]):
            if step:
                sparse = rows([0], [14])
                sparse.restarts[:] = False
                runtime.apply(StepMessage(2, sparse=sparse))
            plan = plan_of(runtime, [14], [[*range(1, 15)]])
            runtime.rank(plan, 0, query)
        slots = plan.out.head_tables[0, :, 1 : 1 + BUDGET] // HEADS
        return [
            runtime.pools.layers[0].slot_page[slots[h].long(), h].sort().values.tolist()
            for h in range(HEADS)
        ]

    mean, current = last_tables(QueryKind.RUNNING_MEAN), last_tables(QueryKind.CURRENT)
    assert mean != current, "-30 q0 outweighs q1 in the mean"


def selections(kinds, queries, retention=5.0, layer_share=1):
    """Pages that each request selects, [step][layer][request][head], by the given query kinds."""
    runtime = make_runtime(BUDGET, layer_share)
    blocks = [[*range(1, 15)], [*range(21, 35)]]
    updates = [
        turning_sparse(
            s, ids, [*range(14 * s, 14 * s + 14)], [40 + 3 * s, 41 + 3 * s, 42 + 3 * s],
            query_kind=int(kinds[s]), retention=retention,
        ).updates[0]
        for s, ids in enumerate(blocks)
    ]  # fmt: skip
    found = []
    for step, layers in enumerate(queries):
        sparse = rows([0, 1], [14, 34])
        sparse.restarts[:] = step == 0
        runtime.apply(StepMessage(step + 1, [], [] if step else updates, sparse))
        plan = plan_of(runtime, [14, 34], blocks)
        found.append([])
        for layer, query in enumerate(layers):
            slots = runtime.rank(plan, layer, query)[:, :, 1 : 1 + BUDGET].long() // HEADS
            pages = runtime.pools.layers[layer].slot_page
            found[-1].append(
                [[pages[slots[s, h], h].tolist() for h in range(HEADS)] for s in range(2)]
            )
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_previous_selects_at_each_step_what_current_selects_at_the_step_before(dtype):
    generator = torch.Generator().manual_seed(5)
    queries = (3 * torch.randn(6, 2, 2, HEADS * GROUP, D, generator=generator)).to(dtype)
    late = torch.cat((queries[:1], queries[:-1]))  # the first step has no query before its own
    current, previous = QueryKind.CURRENT, QueryKind.PREVIOUS
    assert selections([previous] * 2, queries) == selections([current] * 2, late)
    assert selections([previous] * 2, queries) != selections([current] * 2, queries)


@pytest.mark.parametrize("kind", QueryKind)
def test_layers_that_share_attend_to_what_the_first_of_them_selects(kind):
    generator = torch.Generator().manual_seed(7)
    queries = 3 * torch.randn(5, 2, 2, HEADS * GROUP, D, generator=generator)
    alone, shared = selections([kind] * 2, queries), selections([kind] * 2, queries, layer_share=2)
    assert any(first != second for first, second in alone)
    for (first, _), (leader, follower) in zip(alone, shared, strict=True):
        assert leader == follower == first


def test_query_kinds_of_one_batch_do_not_meet():
    generator = torch.Generator().manual_seed(6)
    queries = 3 * torch.randn(5, 2, 2, HEADS * GROUP, D, generator=generator)
    kinds = [*QueryKind]
    alone = {kind: selections([kind] * 2, queries) for kind in kinds}
    for first, second in ((a, b) for a in kinds for b in kinds if a != b):
        for step, layers in enumerate(selections([first, second], queries)):
            for layer, (one, other) in enumerate(layers):
                assert one == alone[first][step][layer][0], (first, second)
                assert other == alone[second][step][layer][1], (first, second)


def test_the_first_token_of_a_sentence_attends_to_its_opening_blocks():
    runtime = make_runtime(working_set=6)
    blocks = list(range(1, PROMPT_BLOCKS + 1))
    pages, private = [*range(30, 30 + len(blocks))], [*range(20, 26)]
    runtime.apply(turning_sparse(0, blocks, pages, private, opening_blocks=6))
    opening = plan_of(runtime, [PROMPT_BLOCKS], [blocks])
    assert opening.batch.budget_blocks.tolist() == [6]
    within = rows([0], [PROMPT_BLOCKS])
    within.restarts[:] = False
    runtime.apply(StepMessage(2, sparse=within))
    later = plan_of(runtime, [PROMPT_BLOCKS], [blocks])
    assert later.batch.budget_blocks.tolist() == [BUDGET]
    assert int(opening.seq_lens[0] - later.seq_lens[0]) == (6 - BUDGET) * N
