# SPDX-License-Identifier: Apache-2.0
"""Whole decode steps as one graph: vLLM's manager, our metadata and a small model on a CPU.

The graph is a fake that does again what it has seen, with the metadata, plan and Python numbers
of the step in which it was captured. So what a later step needs must be in the tensors.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import CUDAGraphMode  # noqa: E402
from vllm.forward_context import override_forward_context  # noqa: E402
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata  # noqa: E402
from vllm.v1.worker.gpu.cudagraph_utils import (  # noqa: E402
    BatchExecutionDescriptor,
    ModelCudaGraphManager,
)

from sentencekv_vllm.types import QueryKind  # noqa: E402
from sentencekv_vllm.vllm_glue import full_graphs, metadata, step_graphs  # noqa: E402
from sentencekv_vllm.vllm_glue.connector import SentenceKVConnectorMetadata  # noqa: E402

from ..worker.fake_graph import FakeGraph  # noqa: E402
from .test_v2_contract import (  # noqa: E402
    GROUP,
    HEADS,
    LAYERS,
    LENGTHS,
    LONG,
    NAMES,
    TABLES,
    D,
    N,
    Worker,
    triton_ops,
)

PADDED = 4  # tokens of the graph
VOCABULARY = 50
PAD_SLOT = -1

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter"),
]


class Model:
    """Attention layers over embeddings, one after the other; the context is set around it."""

    def __init__(self, worker):
        generator = torch.Generator().manual_seed(5)

        def table(heads, width):
            return torch.randn(VOCABULARY, heads, width, generator=generator).half()

        self.queries = [2 * table(HEADS * GROUP, D) for _ in range(LAYERS)]
        self.keys_values = [table(HEADS, 2 * D) for _ in range(LAYERS)]
        self.worker, self.context, self.calls = worker, None, 0

    @contextmanager
    def in_context(self, attn_metadata, vllm_config, **context):
        assert context["cudagraph_runtime_mode"] is CUDAGraphMode.NONE
        self.context = SimpleNamespace(attn_metadata=attn_metadata, **context)
        yield

    def __call__(self, input_ids, positions, intermediate_tensors=None):
        self.calls += 1
        hidden = torch.zeros(len(input_ids), HEADS * GROUP * D, dtype=torch.float16)
        for i, name in enumerate(NAMES):
            query, kv = self.queries[i][input_ids], self.keys_values[i][input_ids]
            slots, cache = self.context.slot_mapping[name], self.worker.caches[i]
            for token in torch.nonzero(slots != PAD_SLOT).flatten().tolist():
                slot = int(slots[token])
                cache[slot // N, :, slot % N] = kv[token]
            output = torch.full_like(hidden, float("nan"))
            scale = torch.ones(())
            layer = SimpleNamespace(layer_name=name, _q_scale=scale, _k_scale=scale, _v_scale=scale)
            built = self.context.attn_metadata[name]
            self.worker.impl.forward(layer, query, kv, kv, cache, built, output)
            hidden = hidden + output
        return hidden


def groups(count):
    """A KV cache configuration of vLLM's."""
    return SimpleNamespace(kv_cache_groups=[None] * count)


class StepWorker(Worker):
    """A V2 worker whose decode steps may be full graphs."""

    def __init__(self, monkeypatch, new_graph, with_graphs, **options):
        super().__init__(triton_ops(), 3, monkeypatch, new_graph, **options)
        connector = self.connector.kv_connector
        for module in (metadata, step_graphs):
            monkeypatch.setattr(module, "get_kv_transfer_group", lambda: connector)
        self.model = Model(self)
        self.buffers = SimpleNamespace(
            input_ids=torch.zeros(PADDED, dtype=torch.int64),
            positions=torch.zeros(PADDED, dtype=torch.int64),
            is_padding=torch.ones(PADDED, dtype=torch.bool),
            slots=torch.full((1, PADDED), PAD_SLOT, dtype=torch.int64),
            table=torch.zeros(PADDED, 14, dtype=torch.int32),
        )
        self.manager = object.__new__(ModelCudaGraphManager)
        self.manager.vllm_config, self.manager.tp_size = None, 1
        parallel = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))
        self.manager.vllm_config = parallel
        self.manager.hidden_states = torch.zeros(PADDED, HEADS * GROUP * D, dtype=torch.float16)
        if with_graphs:
            state = SimpleNamespace(prepare_dummy_inputs=lambda *_: {})
            step_graphs.capture(
                lambda *_, **__: None,
                self.manager,
                self.model,
                state,
                input_buffers=self.buffers,
                kv_cache_config=groups(1),
            )

    def decode(self):
        """A step of the V2 runner with one sparse request; its hidden state and whether the step
        was dispatched as a full graph."""
        self.patch.setattr(metadata, "has_kv_transfer_group", lambda: True)
        self.patch.setattr(step_graphs, "set_forward_context", self.model.in_context)
        message = self.message(sparse=True)
        output = SimpleNamespace(
            kv_connector_metadata=SentenceKVConnectorMetadata(message),
            has_sync_kv_loads=True,
            finished_req_ids=set(),
            num_scheduled_tokens={LONG: 1},
        )
        runner = SimpleNamespace(cudagraph_manager=self.manager)
        _, uniform = full_graphs.gather_batch_req_state(
            lambda *_: (None, 1), runner, output, dummy_run=False
        )
        is_full = uniform == 1
        rows, length = PADDED if is_full else 1, LENGTHS[LONG] + self.step - 1
        self.buffers.input_ids[0] = (7 * self.step) % VOCABULARY
        slot = TABLES[LONG][(length - 1) // N] * N + (length - 1) % N
        self.buffers.slots[0, 0] = slot
        self.buffers.table[0, : len(TABLES[LONG])] = torch.tensor(TABLES[LONG])
        starts = torch.ones(rows + 1, dtype=torch.int32)
        starts[0] = 0
        built = build_attn_metadata(
            attn_groups=self.groups,
            num_reqs=rows,
            num_tokens=rows,
            query_start_loc_gpu=starts,
            query_start_loc_cpu=starts,
            max_query_len=1,
            seq_lens=torch.tensor([length] + [0] * (rows - 1), dtype=torch.int32),
            max_seq_len=length,
            block_tables=[self.buffers.table[:rows]],
            slot_mappings=self.buffers.slots[:, :rows],
            kv_cache_config=SimpleNamespace(kv_cache_groups=[None]),
            seq_lens_cpu_upper_bound=torch.tensor([length] * rows, dtype=torch.int32),
            req_idx=np.arange(rows),
        )
        batch = SimpleNamespace(idx_mapping=None, req_ids=[LONG], num_tokens=1)
        with override_forward_context(SimpleNamespace()):
            self.connector.pre_forward(output, batch, attn_metadata=built if is_full else None)
            self.poison(message)
            if is_full:
                desc = BatchExecutionDescriptor(CUDAGraphMode.FULL, PADDED, PADDED, 1)
                hidden = step_graphs.run_fullgraph(None, self.manager, desc)
            else:
                self.model.context = SimpleNamespace(
                    attn_metadata=built, slot_mapping=dict.fromkeys(NAMES, self.buffers.slots[0])
                )
                hidden = self.model(self.buffers.input_ids[:1], None)
        self.connector.finish_forward()
        with override_forward_context(SimpleNamespace()):
            self.connector.post_forward(set())
        return hidden[0].clone(), is_full


def graphs_of(worker):
    (tensors,) = worker.runtime._planner._buffers[0].values()
    return [graph for graph in tensors.graphs._graphs.values() if graph is not None]


def test_replayed_whole_steps_equal_steps_without_graphs(monkeypatch):
    whole = StepWorker(monkeypatch, FakeGraph, with_graphs=True)
    layers = StepWorker(monkeypatch, FakeGraph, with_graphs=False)
    for step in range(12):  # into the next block
        results = []
        for worker in (whole, layers):
            for module in (metadata, step_graphs):
                connector = worker.connector.kv_connector
                monkeypatch.setattr(
                    module, "get_kv_transfer_group", lambda connector=connector: connector
                )
            results.append(worker.decode())
        (ours, is_full), (theirs, never) = results
        assert is_full and not never
        assert torch.equal(ours, theirs), f"step {step}"
        assert not ours.isnan().any()
    for name in ("page_slot", "slot_page", "slot_stamp", "kept"):
        one, other = (getattr(worker.runtime.pools, name) for worker in (whole, layers))
        assert torch.equal(one, other), name
    # One for the start of a step and one for its forward, against one a layer.
    assert len(graphs_of(whole)) == 2 and len(graphs_of(layers)) == 1 + LAYERS


def test_a_step_that_cannot_be_recorded_runs_and_is_the_last_that_is_tried(monkeypatch, caplog):
    class Refusing(FakeGraph):
        def capture(self, work):
            if work.__name__ == "forward":
                raise RuntimeError("operation not permitted when stream is capturing")
            super().capture(work)

    whole = StepWorker(monkeypatch, Refusing, with_graphs=True)
    layers = StepWorker(monkeypatch, FakeGraph, with_graphs=False)
    modes = []
    for _ in range(4):
        results = []
        for worker in (whole, layers):
            connector = worker.connector.kv_connector
            for module in (metadata, step_graphs):
                monkeypatch.setattr(
                    module, "get_kv_transfer_group", lambda connector=connector: connector
                )
            results.append(worker.decode())
        modes.append(results[0][1])
        assert torch.equal(results[0][0], results[1][0])
    assert modes == [True, True, False, False]
    assert "could not be recorded as one CUDA graph (operation not permitted" in caplog.text


@pytest.mark.parametrize(
    "change", ["no graphs", "tensor parallel", "more inputs", "windows", "ahead"]
)
def test_steps_that_cannot_be_one_graph_are_not(monkeypatch, change):
    graph = None if change == "no graphs" else FakeGraph
    kind = QueryKind.PREVIOUS if change == "ahead" else QueryKind.CURRENT
    worker = StepWorker(monkeypatch, graph, with_graphs=True, query_kind=kind)
    if change in ("tensor parallel", "more inputs", "windows"):
        del worker.manager.sentencekv_forward
        worker.manager.tp_size = 2 if change == "tensor parallel" else 1
        extra = {"inputs_embeds": 0} if change == "more inputs" else {}
        state = SimpleNamespace(prepare_dummy_inputs=lambda *_: extra)
        step_graphs.capture(
            lambda *_, **__: None,
            worker.manager,
            worker.model,
            state,
            input_buffers=worker.buffers,
            kv_cache_config=groups(3 if change == "windows" else 1),
        )
    if change == "ahead":
        worker.runtime._prefetch = object()
        rows = SimpleNamespace(slots=np.array([1]), restarts=np.array([False]))
        worker.runtime._rows = rows
        worker.runtime.tables.options["query_kind"][1] = int(QueryKind.PREVIOUS)
        assert not worker.runtime.is_recordable(1)
        rows.restarts[:] = True
        assert worker.runtime.is_recordable(1), "the first step ranks in the layers"
        return
    hidden, is_full = worker.decode()
    assert not is_full and not hidden.isnan().any()


def test_a_batch_with_other_rows_is_not_recordable(monkeypatch):
    runtime = StepWorker(monkeypatch, FakeGraph, with_graphs=True).runtime
    runtime._rows = SimpleNamespace(slots=np.array([1]), restarts=np.array([True]))
    assert runtime.is_recordable(1) and not runtime.is_recordable(2)
    runtime._watched = object()
    assert not runtime.is_recordable(1)
