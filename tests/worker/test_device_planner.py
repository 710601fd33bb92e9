# SPDX-License-Identifier: Apache-2.0
"""Steps on persistent tensors, replayed from graphs, do what steps on their own tensors do."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from sentencekv_vllm.messages import DecodeOptions, RequestUpdate, SparseRows, StepMessage
from sentencekv_vllm.ops.layer_ops import ReferenceOps
from sentencekv_vllm.ops.load import Sizes
from sentencekv_vllm.ops.sparse_decode import sparse_decode
from sentencekv_vllm.ops.token_layout import TokenLayout
from sentencekv_vllm.types import Fate, Geometry, IndexKind, Reduce, Settlement
from sentencekv_vllm.worker import device_planner
from sentencekv_vllm.worker.runtime import Runtime
from sentencekv_vllm.worker.step_buffers import StepSize, power_of_two
from sentencekv_vllm.worker.warm_up import warm_up

from .fake_graph import FakeGraph

N, D, HEADS, GROUP, LAYERS, SLOTS, WORKING_SET = 8, 16, 2, 2, 2, 5, 4
BLOCKS, PAGES, CONTEXT = 120, 120, 40  # of the cache, of the swap pool, of the longest request
CPU = torch.device("cpu")
GEOMETRY = Geometry(
    LAYERS, HEADS, GROUP, D, N, rows_per_page=2, scale=D**-0.5, vectors_per_row=2, code_width=D
)


class SteppedReference(ReferenceOps):
    """The definition, told of the step as kernels in a graph are."""

    def set_step(self, step):
        self.step = step

    def decode_layer(self, geometry, pools, batch, query, out):
        super().decode_layer(geometry, pools, replace(batch, step=self.step), query, out)
        self.rows = len(batch.num_pages)

    def reuse_selection(self, pools, batch, out):
        super().reuse_selection(pools, replace(batch, step=self.step), out)

    def estimate_unselected(self, geometry, pools, batch, *rest):
        super().estimate_unselected(geometry, pools, replace(batch, step=self.step), *rest)


def make_runtime(
    persistent,
    new_graph=None,
    layer_share=1,
    max_pages=CONTEXT,
    prefetch=None,
    ops=None,
    warm_ops=None,
):
    sizes = Sizes(GEOMETRY, CPU, SLOTS, max_pages, 80, WORKING_SET)
    generator = torch.Generator().manual_seed(0)
    caches = [torch.randn(BLOCKS, HEADS, N, 2 * D, generator=generator) for _ in range(LAYERS)]
    token_order = torch.arange(N * D).view(N, D)  # of K, the first half of a head-block
    return Runtime(
        GEOMETRY,
        caches,
        TokenLayout(token_order, token_order + N * D),
        num_pages=PAGES,
        num_slots=SLOTS,
        working_set_blocks=WORKING_SET,
        ops=ops or SteppedReference(),
        layer_names=[str(i) for i in range(LAYERS)],
        layer_share=layer_share,
        sizes=sizes if persistent else None,
        new_graph=new_graph,
        prefetch=prefetch,
        warm_ops=warm_ops,
        observation_window=int(warm_ops is not None),
    )


class Request:
    """A tracked request: `blocks` are its own, pages are named after its slot."""

    def __init__(self, slot, blocks, generator, query_kind=None):
        self.slot, self.generator = slot, generator
        self.blocks = [1 + 20 * slot + i % 15 for i in range(CONTEXT)]  # any content will do
        self.private = [1 + 20 * slot + 15 + i for i in range(WORKING_SET)]
        self.copied, self.sentences, self.length = 0, 0, blocks * N - 3
        kinds = torch.randint(0, 99, (3,), generator=generator).tolist()
        self.options = DecodeOptions(
            index_kind=[int(IndexKind.TOKEN_CODES), int(IndexKind.CENTROID)][kinds[0] % 2],
            reduce=[int(Reduce.MEAN), int(Reduce.SOFTMAX_MEAN)][kinds[1] % 2],
            retention=float(kinds[2] % 3),
            query_kind=kinds[0] % 3 if query_kind is None else int(query_kind),
            budget_blocks=2 + kinds[1] % 3,
            seed=kinds[2],
            settlement=Settlement(Fate.COMPACT) if kinds[1] % 5 == 0 else None,
            estimates=kinds[1] % 5 != 0 and kinds[2] % 2 == 0,
        )

    def update(self):
        """What has become full since the last step, two blocks behind the tail."""
        full = self.length // N - 1
        new = [*range(self.copied, full)]
        if not new:
            return None
        pages = [20 * self.slot + i for i in new]
        first = not self.copied
        ends = np.arange(self.copied * N + 4, full * N + 1, 4, dtype=np.int32)
        self.copied = full
        return RequestUpdate(
            self.slot,
            self.options if first else None,
            [self.blocks[i] for i in new],
            [page % PAGES for page in pages],
            [page % PAGES for page in pages],
            ends,
            self.private if first else None,
            last_query=0,
        )


def buffers(rows):
    return torch.empty(rows, HEADS * GROUP, D), torch.empty(rows, HEADS * GROUP, D)


def life(runtime, steps=14, seed=1, query_kind=None, attended=lambda *_: None):
    """Requests come and go; outputs of every step and layer, and the state at the end.

    Args:
        query_kind: of all requests; None: any.
        attended: told of plan, layer and tables whenever a layer attends.
    """
    generator = torch.Generator().manual_seed(seed)
    running, outputs, addresses, dropped, estimated = {}, [], {}, [], 0
    for step in range(1, steps + 1):
        slot = int(torch.randint(0, SLOTS, (1,), generator=generator))
        if slot not in running:
            blocks = int(torch.randint(6, 18, (1,), generator=generator))
            running[slot] = Request(slot, blocks, generator, query_kind)
        elif step % 3 == 0 and len(running) > 1:
            del running[slot]
            dropped.append(slot)
        order = sorted(running, key=lambda s: (s * 7 + step) % 5)
        requests = [running[s] for s in order]
        restarts = np.asarray([not r.copied or r.length % 23 == 8 for r in requests])
        for request in requests:
            request.length += 1
        updates = [u for r in requests if (u := r.update()) is not None]

        def column(values):
            return np.asarray([*values], np.int32)

        rows = SparseRows(
            column(order),
            column(r.blocks[(r.length - 1) // N] for r in requests),
            column(1 for _ in requests),
            column(r.copied for r in requests),
            column(r.length for r in requests),
            restarts,
            [str(s) for s in order],
        )
        runtime.apply(StepMessage(step, dropped, updates, rows, frees=True))
        dropped = []
        batch = [str(s) for s in order]
        batch.insert(step % (len(batch) + 1), "dense")
        runtime.set_batch_order(batch)
        table = torch.zeros(len(batch), CONTEXT, dtype=torch.int32)
        for i, name in enumerate(batch):
            if name != "dense":
                table[i] = torch.tensor(running[int(name)].blocks)
        (plan,) = runtime.plan(table, torch.empty(0), torch.arange(len(batch)))
        tensors = (plan.batch.pages, plan.tokens, plan.slots, plan.seq_lens, plan.out.head_tables,
                   plan.out.hits)  # fmt: skip
        shape = (
            tuple(plan.out.head_tables.shape),
            plan.batch.pages.shape,
            plan.batch.sentence_ends.shape,
        )
        known = addresses.setdefault(shape, [t.data_ptr() for t in tensors])
        stays = known == [t.data_ptr() for t in tensors]
        for layer in range(LAYERS):
            whole = torch.randn(len(batch), HEADS * GROUP, D, generator=generator)
            query, output = plan.graphs.once("buffers", partial(buffers, len(plan.tokens)))
            torch.index_select(whole, 0, plan.tokens, out=query)
            cache = runtime.pools.layers[layer].cache.view(BLOCKS, HEADS, 2 * N, D)

            def work(plan=plan, layer=layer, query=query, output=output, cache=cache):
                tables = runtime.rank(plan, layer, query)
                attended(plan, layer, tables)
                key, value = cache.chunk(2, dim=2)
                result = sparse_decode(query, key, value, tables, plan.seq_lens, GEOMETRY.scale)
                output.copy_(result[0])
                runtime.estimate(plan, layer, query, tables, output, result[1])

            runtime.await_layer(plan, layer)
            plan.graphs.run((layer, *plan.variant), work)
            estimated += plan.estimates is not None
            outputs.append(output[: len(plan.rows)].clone())
        report = runtime.take_report()
        outputs.append(torch.from_numpy(np.stack((report.hits, report.misses))))
        assert report.slots.tolist() == order
        runtime.end_step()
    assert estimated or steps < 14, "some rows estimate"
    pools = runtime.pools
    names = ("kept", "page_kept", "page_slot", "slot_page", "slot_stamp")
    state = {name: getattr(pools, name).clone() for name in names}
    return outputs, state, stays


@pytest.mark.parametrize("layer_share", [1, 2])
def test_replays_equal_the_eager_steps_of_any_life(layer_share):
    expected, state, _ = life(make_runtime(False, layer_share=layer_share))
    for new_graph in (None, FakeGraph):
        FakeGraph.made.clear()
        runtime = make_runtime(True, new_graph, layer_share)
        outputs, left, stays = life(runtime)
        assert stays, "tensors of a size never move"
        for a, b in zip(outputs, expected, strict=True):
            # Estimates are sums over padded groups, which round in another order.
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert all(torch.equal(left[name], state[name]) for name in state)
        counted = runtime.take_counters()
        assert counted["sparse_steps"] == 14
    replays = sum(graph.replays for graph in FakeGraph.made)
    assert replays > len(FakeGraph.made) > 3, "most steps are replays"


def test_rows_are_padded_to_a_few_sizes_and_the_padding_selects_nothing():
    runtime = make_runtime(True)
    life(runtime, steps=7)
    for size, tensors in runtime._planner._buffers[0].items():
        assert size.rows == len(tensors.lengths) and size.rows in (1, 2, 4, SLOTS)
    tensors = next(reversed(runtime._planner._buffers[0].values()))
    slots = tensors.inputs["slots"].tolist()
    padding = [i for i, slot in enumerate(slots) if slot == SLOTS]
    assert padding
    assert all(
        int(tensors.inputs[name][i]) == 0
        for i in padding
        for name in ("num_pages", "num_sentences", "budget_blocks", "history_hi", "seq_lens")
    )
    assert not tensors.lengths[padding].any() and not tensors.totals.hits[padding].any()


def test_the_least_used_size_goes_first(monkeypatch):
    monkeypatch.setattr(device_planner, "MAX_SIZES", 2)
    expected, _, _ = life(make_runtime(False))
    runtime = make_runtime(True, FakeGraph)
    outputs, _, _ = life(runtime)
    assert len(runtime._planner._buffers[0]) == 2
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_sizes_are_powers_of_two_up_to_the_limits():
    limits = StepSize(6, 600, 1000, 0, 0)
    assert [power_of_two(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
    assert StepSize.of(5, 65, 3, 9, 40, limits) == StepSize(6, 128, 64, 16, 40)
    assert StepSize.of(1, 600, 900, 3, 40, limits) == StepSize(1, 600, 1000, 8, 40)
    with pytest.raises(AssertionError):
        StepSize.of(7, 65, 3, 9, 40, limits)


@pytest.mark.parametrize("max_pages", [3, CONTEXT])
def test_the_made_up_request_is_no_longer_than_a_request_can_be(max_pages):
    """A short context and a large working set; compiled, captured and replayed for each kind."""
    FakeGraph.made.clear()
    runtime = make_runtime(True, FakeGraph, max_pages=max_pages)
    steps = []

    def attend(plan, query):
        plan.graphs.run("layer", lambda: steps.append(runtime.rank(plan, 0, query)))

    warm_up(runtime, attend)
    assert len(steps) == 24 and not runtime.has_sparse_rows
    assert runtime._planner._limits.pages == max_pages and len(FakeGraph.made) == 2
