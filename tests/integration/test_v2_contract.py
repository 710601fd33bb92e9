# SPDX-License-Identifier: Apache-2.0
"""The CUDA glue under vLLM's V2 model runner, as far as a CPU goes.

vLLM's own `build_attn_metadata` and `ActiveKVConnector` are called in the order of the V2
runner: the requests are named after metadata were built. Our Triton kernels run interpreted;
vLLM's Triton attention, which cannot, is replaced by its definition.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402
from vllm.forward_context import override_forward_context  # noqa: E402
from vllm.v1.attention.backend import (  # noqa: E402
    AttentionCGSupport,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends import triton_attn  # noqa: E402
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, get_attn_cg_support  # noqa: E402
from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector  # noqa: E402
from vllm.v1.worker.utils import AttentionGroup  # noqa: E402

from sentencekv_vllm.messages import (  # noqa: E402
    DecodeOptions,
    RequestUpdate,
    SparseRows,
    StepMessage,
    VisitRows,
)
from sentencekv_vllm.ops.layer_ops import ReferenceOps  # noqa: E402
from sentencekv_vllm.ops.load import Sizes  # noqa: E402
from sentencekv_vllm.triton_kernels.layer_ops import TritonOps  # noqa: E402
from sentencekv_vllm.triton_kernels.workspace import Workspace  # noqa: E402
from sentencekv_vllm.types import Geometry, QueryKind  # noqa: E402
from sentencekv_vllm.vllm_glue import cuda, full_graphs, metadata  # noqa: E402
from sentencekv_vllm.vllm_glue.connector import (  # noqa: E402
    SentenceKVConnector,
    SentenceKVConnectorMetadata,
)
from sentencekv_vllm.worker.prefetch import Prefetch  # noqa: E402
from sentencekv_vllm.worker.runtime import Runtime  # noqa: E402
from sentencekv_vllm.worker.visit_stream import VisitSideStream  # noqa: E402

from ..worker.fake_streams import FakeStreams  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter")

N, D, HEADS, GROUP, LAYERS, BLOCKS = 16, 64, 2, 2, 2, 48
CPU = torch.device("cpu")
GEOMETRY = Geometry(
    num_layers=LAYERS,
    num_kv_heads=HEADS,
    group_size=GROUP,
    head_dim=D,
    block_size=N,
    rows_per_page=2,
    code_width=D,
    scale=D**-0.5,
)
NAMES = [f"layers.{i}.attn" for i in range(LAYERS)]
RUNNER = SimpleNamespace(cudagraph_manager=None)  # eager
LONG, SHORT, CHUNK = "long", "short", "chunk"
TABLES = {LONG: [*range(1, 12)], SHORT: [20, 21], CHUNK: [30, 31, 32]}
LENGTHS = {LONG: 10 * N + 5, SHORT: N + 3, CHUNK: 2 * N + 7}  # after the first step
QUERIES = {LONG: 1, SHORT: 1, CHUNK: 5}  # tokens in each step
PRIVATE, HISTORY = [40, 41, 42, 43, 44, 45, 46], (1, 8)


def attention(query, cache, table, length):
    """[q, Hq, D] queries at the end of `length` tokens, in float32."""
    kv = cache[table].transpose(1, 2).reshape(-1, HEADS, 2 * D)[:length].float()
    keys, values = kv.repeat_interleave(GROUP, 1).split(D, dim=-1)
    logits = torch.einsum("qhd,khd->hqk", query.float(), keys) * GEOMETRY.scale
    last = torch.arange(length - len(query), length)
    logits.masked_fill_(torch.arange(length) > last[:, None], float("-inf"))
    return torch.einsum("hqk,khd->qhd", logits.softmax(-1), values)


def unified_attention(q, k, v, out, cu_seqlens_q, seqused_k, block_table, **_):
    """Definition of vLLM's kernel; it reads what its metadata tell it to read."""
    cache = torch.cat((k, v), -1).transpose(1, 2)
    starts = cu_seqlens_q.tolist()
    for i, length in enumerate(seqused_k.tolist()):
        rows = slice(starts[i], starts[i + 1])
        table = block_table[i, : -(-length // N)].long()
        out.view(-1, HEADS * GROUP, D)[rows] = attention(q[rows], cache, table, length).to(q.dtype)


SIZES = Sizes(
    GEOMETRY, CPU, max_requests=2, max_pages=12, max_sentences=40, max_selected=len(PRIVATE)
)


def triton_ops():
    limits = (SIZES.max_requests, SIZES.max_pages, SIZES.max_sentences, SIZES.max_selected)
    return TritonOps(Workspace.allocate(GEOMETRY, *limits, CPU))


class Graph:
    """A graph without a GPU: the work it has seen, done again on the tensors it has seen."""

    def capture(self, work):
        self.replay = work


class Worker:
    """A V2 worker reduced to what concerns attention and the connector."""

    def __init__(self, ops, budget, monkeypatch, new_graph=None, query_kind=0, prefetch=None):
        generator = torch.Generator().manual_seed(3)
        whole = torch.empty(LAYERS, BLOCKS, HEADS, N, 2 * D).half()
        for cache in whole:
            cache.copy_(torch.randn(BLOCKS, HEADS, N, 2 * D, generator=generator))
        self.caches = [*whole]  # vLLM's KV cache is one buffer
        for cache in self.caches:
            cache[0] = 0  # vLLM's null block
        self.exact = [cache.clone() for cache in self.caches]  # nothing is ever freed here
        self.budget, self.step, self.generator = budget, 0, generator
        self.query_kind = query_kind
        config = SimpleNamespace(kv_transfer_config=object())
        connector = SentenceKVConnector(config, "worker", None)
        connector.runtime = Runtime(
            GEOMETRY,
            self.caches,
            cuda.token_layout(self.caches[0], None),
            num_pages=16,
            num_slots=3,
            working_set_blocks=len(PRIVATE),
            ops=ops,
            layer_names=NAMES,
            sizes=None if new_graph is None else SIZES,
            new_graph=new_graph,
            prefetch=prefetch,
            visits=VisitSideStream(CPU, LAYERS, FakeStreams()),
        )
        self.visiting = False  # the chunk's second block is on the host
        self.runtime = connector.runtime
        self.patch = monkeypatch
        monkeypatch.setattr(triton_attn, "unified_attention", unified_attention)
        self.connector = object.__new__(ActiveKVConnector)
        self.connector.kv_connector, self.connector._disabled = connector, False
        self.connector._pending_load_kwargs = None

        builder = object.__new__(cuda.MetadataBuilder)
        for name in ("softmax_segm_output", "softmax_segm_max", "softmax_segm_expsum"):
            setattr(builder, name, None)
        builder.seq_threshold_3D = builder.num_par_softmax_segments = 16
        builder.max_seqs_64_segments, builder.rswa_window = 0, None
        spec = SimpleNamespace(block_size=N)
        backend = SimpleNamespace(__name__="SentenceKVBackend")
        group = AttentionGroup(backend, NAMES, spec, 0, metadata_builders=[builder])
        self.groups = [[group]]
        self.impl = object.__new__(cuda.Impl)
        self.impl.__dict__.update(
            attn_type="decoder", head_size=D, scale=GEOMETRY.scale, kv_cache_dtype="auto",
            _is_per_token_head_quant=False, _kv_quant_mode=None, alibi_slopes=None,
            use_alibi_sqrt=False, sliding_window=(-1, -1), logits_soft_cap=0, sinks=None,
            chunk_lookback=-1, use_td=False, _set_kv_ptr_range=False,
        )  # fmt: skip

    def message(self, sparse):
        self.step += 1
        updates, rows = [], None
        if self.step == 1 and sparse:
            options = DecodeOptions(
                index_kind=0,
                reduce=0,
                retention=1.0,
                query_kind=int(self.query_kind),
                budget_blocks=self.budget,
                seed=0,
            )
            copied = TABLES[LONG][: HISTORY[1]]
            ends = np.arange(11, len(copied) * N + 1, 11, dtype=np.int32)
            ends = np.append(ends, np.int32(len(copied) * N))
            pages = [*range(3, 3 + len(copied))]
            updates = [RequestUpdate(1, options, copied, pages, pages, ends, PRIVATE)]
        if sparse:
            length = LENGTHS[LONG] + self.step - 1
            tail = TABLES[LONG][(length - 1) // N]
            slot, tail, lo, hi, length = (
                np.asarray([value], np.int32) for value in (1, tail, *HISTORY, length)
            )
            restarts = np.full(1, self.step == 1)
            rows = SparseRows(slot, tail, lo, hi, length, restarts, [LONG])
        message = StepMessage(self.step, [], updates, rows, frees=self.step == 1)
        return self.with_visit(message) if self.visiting else message

    def with_visit(self, message):
        """The chunk's first two blocks have been copied out, and the second has been freed."""
        updates = message.updates
        if self.step == 1:
            options = DecodeOptions(0, 0, 1.0, 0, 3, 0, D // 8)
            ends = np.asarray([N, 2 * N], np.int32)
            copied = TABLES[CHUNK][:2]
            told = RequestUpdate(2, options, copied, [0, 1], [0, 1], ends, None, staging=[36])
            updates = [*updates, told]
        tail = TABLES[CHUNK][(LENGTHS[CHUNK] + (self.step - 1) * QUERIES[CHUNK] - 1) // N]
        columns = (np.asarray([value], np.int32) for value in (2, tail, 1, 2))
        return replace(message, updates=updates, visits=VisitRows(*columns, [CHUNK]))

    def run(self, order, sparse=True, named=True):
        """One step of the V2 runner; outputs by request and layer, expected ones next to it."""
        connector = self.connector.kv_connector
        self.patch.setattr(metadata, "has_kv_transfer_group", lambda: True)
        self.patch.setattr(metadata, "get_kv_transfer_group", lambda: connector)
        message = self.message(sparse)
        counts = [QUERIES[r] for r in order]
        lengths = [LENGTHS[r] + (self.step - 1) * QUERIES[r] for r in order]
        starts = [0, *np.cumsum(counts).tolist()]
        table = torch.full((len(order), 14), 47, dtype=torch.int32)  # stale ids behind
        slots = []
        for i, r in enumerate(order):
            table[i, : len(TABLES[r])] = torch.tensor(TABLES[r])
            for position in range(lengths[i] - counts[i], lengths[i]):
                slots.append(TABLES[r][position // N] * N + position % N)
        num_tokens = starts[-1]
        output = SimpleNamespace(
            kv_connector_metadata=SentenceKVConnectorMetadata(message),
            has_sync_kv_loads=named and (message.sparse is not None or self.visiting),
            finished_req_ids=set(),
            num_scheduled_tokens=dict(zip(order, counts, strict=True)),
        )
        self.uniform_tokens = full_graphs.gather_batch_req_state(
            lambda *_: (None, 1), RUNNER, output, dummy_run=False
        )[1]
        built = build_attn_metadata(
            attn_groups=self.groups,
            num_reqs=len(order),
            num_tokens=num_tokens,
            query_start_loc_gpu=torch.tensor(starts, dtype=torch.int32),
            query_start_loc_cpu=torch.tensor(starts, dtype=torch.int32),
            max_query_len=max(counts),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            max_seq_len=max(lengths),
            block_tables=[table],
            slot_mappings=torch.tensor([slots]),
            kv_cache_config=SimpleNamespace(kv_cache_groups=[None]),
            seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
            req_idx=np.arange(len(order)),
        )
        batch = SimpleNamespace(idx_mapping=None, req_ids=order, num_tokens=num_tokens)
        with override_forward_context(SimpleNamespace()):
            self.connector.pre_forward(output, batch)
            self.poison(message)
            results = [self.layer(i, built, order, slots, starts, lengths) for i in range(LAYERS)]
        self.connector.finish_forward()
        with override_forward_context(SimpleNamespace()):
            self.report = self.connector.post_forward(set())
        return results

    def poison(self, message):
        """Freed blocks are somebody else's from the step on that frees them."""
        if message.sparse is not None:
            for cache in self.caches:
                cache[TABLES[LONG][HISTORY[0] : HISTORY[1]]] = float("nan")
        if message.visits is not None:
            for cache in self.caches:
                cache[TABLES[CHUNK][1]] = cache[36] = float("nan")

    def layer(self, i, built, order, slots, starts, lengths):
        tokens = starts[-1]
        kv = torch.randn(tokens, HEADS, 2 * D, generator=self.generator).half()
        query = 2 * torch.randn(tokens, HEADS * GROUP, D, generator=self.generator).half()
        for cache in (self.caches[i], self.exact[i]):
            for token, slot in enumerate(slots):
                cache[slot // N, :, slot % N] = kv[token]
        output = torch.full((tokens + 3, HEADS * GROUP * D), float("nan")).half()  # padded
        padded = torch.cat((query, torch.zeros(3, HEADS * GROUP, D).half()))
        scale = torch.ones(())
        layer = SimpleNamespace(layer_name=NAMES[i], _q_scale=scale, _k_scale=scale, _v_scale=scale)
        self.impl.forward(layer, padded, kv, kv, self.caches[i], built[NAMES[i]], output)
        outputs, expected = {}, {}
        for row, r in enumerate(order):
            span = slice(starts[row], starts[row + 1])
            outputs[r] = output[span].view(-1, HEADS * GROUP, D).float()
            expected[r] = attention(query[span], self.exact[i], TABLES[r], lengths[row])
        return outputs, expected


ORDERS = ([SHORT, LONG, CHUNK], [LONG, CHUNK], [LONG], [LONG, SHORT])


@pytest.mark.slow
@pytest.mark.parametrize("make_ops", [triton_ops, ReferenceOps])
def test_a_covering_budget_gives_dense_attention_in_any_batch(make_ops, monkeypatch):
    worker = Worker(make_ops(), HISTORY[1] - HISTORY[0], monkeypatch)
    for order in ORDERS:
        for outputs, expected in worker.run(order):
            for r in order:
                torch.testing.assert_close(outputs[r], expected[r], atol=0.02, rtol=0.02)
    report = worker.report.kv_connector_worker_meta.report
    assert report.slots.tolist() == [1]
    assert report.hits[0] == LAYERS * HEADS * (HISTORY[1] - HISTORY[0]) and not report.misses[0]
    assert report.coverage[0] == pytest.approx(LAYERS * 1.0 / LAYERS, abs=1e-3)


@pytest.mark.slow
def test_both_ops_select_and_attend_alike_under_a_budget(monkeypatch):
    workers = [Worker(ops, 3, monkeypatch) for ops in (triton_ops(), ReferenceOps())]
    for order in ORDERS:
        mine, defined = (worker.run(order) for worker in workers)
        for (a, _), (b, _) in zip(mine, defined, strict=True):
            for r in order:
                torch.testing.assert_close(a[r], b[r], atol=0.02, rtol=0.02)
        pools = [worker.runtime.pools for worker in workers]
        assert torch.equal(pools[0].page_slot, pools[1].page_slot)
        assert torch.equal(pools[0].slot_stamp, pools[1].slot_stamp)


@pytest.mark.slow
def test_replayed_graphs_equal_the_eager_steps(monkeypatch):
    eager, replayed = (Worker(triton_ops(), 3, monkeypatch, graph) for graph in (None, Graph))
    for order in (*ORDERS, [SHORT, LONG]):
        ours, theirs = replayed.run(order), eager.run(order)
        for (a, _), (b, _) in zip(ours, theirs, strict=True):
            assert all(torch.equal(a[r], b[r]) for r in order)
    for name in ("page_slot", "slot_page", "slot_stamp", "kept"):
        one, other = (getattr(worker.runtime.pools, name) for worker in (eager, replayed))
        assert torch.equal(one, other), name
    (tensors,) = replayed.runtime._planner._buffers[0].values()
    assert sum(graph is not None for graph in tensors.graphs._graphs.values()) == 1 + LAYERS


@pytest.mark.slow
def test_ranking_ahead_equals_ranking_in_the_layers(monkeypatch):
    ahead = Prefetch(CPU, LAYERS, Graph, FakeStreams())
    workers = [
        Worker(triton_ops(), 3, monkeypatch, Graph, QueryKind.PREVIOUS, prefetch)
        for prefetch in (None, ahead)
    ]
    for order in (*ORDERS, [SHORT, LONG]):
        inline, prefetched = (worker.run(order) for worker in workers)
        for (a, _), (b, _) in zip(inline, prefetched, strict=True):
            assert all(torch.equal(a[r], b[r]) for r in order)
    for name in ("page_slot", "slot_page", "slot_stamp", "kept"):
        one, other = (getattr(worker.runtime.pools, name) for worker in workers)
        assert torch.equal(one, other), name
    (sizes,) = workers[1].runtime._planner._buffers.values()
    (tensors,) = sizes.values()
    graphs = tensors.graphs.once("layer tables", lambda: None).graphs._graphs
    assert sum(graph is not None for graph in graphs.values()) == LAYERS


class Launches(TorchDispatchMode):
    """Counts torch's ops that are no views, and Triton's launches."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.torch, self.triton = [], 0
        run = InterpretedFunction.run

        def counted(function, *args, **kwargs):
            self.triton += 1
            return run(function, *args, **kwargs)

        monkeypatch.setattr(InterpretedFunction, "run", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.torch.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("replayed", [False, True])
def test_launches_of_a_layer(monkeypatch, replayed):
    """The figures of docs/performance.md."""

    class Replayed(Graph):
        def replay(self):
            """One launch, whatever is in it."""

        def capture(self, work):
            pass

    worker = Worker(triton_ops(), 3, monkeypatch, Replayed)
    worker.layer = lambda i, built, *rest: built[NAMES[i]].split
    for _ in range(1 + replayed):
        split = worker.run([LONG])[0]
    (call,), cache = split.sparse, worker.caches[0]
    assert call.whole_batch
    heads = (1, HEADS * GROUP, D)
    arguments = (torch.zeros(heads).half(), cache, call, torch.zeros(heads).half(), 1.0)
    if replayed:
        cuda.run_layer(0, *arguments)
    with Launches(monkeypatch) as launches:
        cuda.run_layer(0, *arguments)
    around = ["copy_", "copy_"]  # queries and outputs; index_select, index_copy_ in mixed batches
    assert launches.torch[0] == launches.torch[-1] == "copy_"
    if replayed:
        assert launches.torch == around and launches.triton == 0
    else:
        assert launches.torch.count("zero_") == 1  # of num_misses, which CudaOps does not have
        assert launches.triton == 7


@pytest.mark.slow
def test_rows_found_by_name_are_the_rows_found_by_the_block_they_write(monkeypatch):
    by_name, by_block = (Worker(ReferenceOps(), 3, monkeypatch) for _ in range(2))
    for order in ORDERS[1:]:
        named, unnamed = by_name.run(order), by_block.run(order, named=False)
        for (a, _), (b, _) in zip(named, unnamed, strict=True):
            assert all(torch.equal(a[r], b[r]) for r in order)


@pytest.mark.parametrize("sparse", [True, False])
def test_history_on_the_host_visits_beside_sparse_and_dense_rows(monkeypatch, sparse):
    visited, resident = (Worker(ReferenceOps(), 3, monkeypatch) for _ in range(2))
    visited.visiting = True
    for order in ([SHORT, CHUNK, LONG], [LONG, CHUNK]):
        ours, stock = visited.run(order, sparse=sparse), resident.run(order, sparse=sparse)
        assert visited.uniform_tokens is None, "no full graph has such rows"
        for (a, expected), (b, _) in zip(ours, stock, strict=True):
            assert all(torch.equal(a[r], b[r]) for r in order), "bit for bit"
            torch.testing.assert_close(a[CHUNK], expected[CHUNK], atol=0.02, rtol=0.02)
    copied = visited.report.kv_connector_stats.data["visit_bytes"]
    assert copied == LAYERS * HEADS * N * 2 * D * 2, "one block of every layer, in float16"


def test_a_visit_that_nobody_planned_is_an_error(monkeypatch):
    worker = Worker(ReferenceOps(), 3, monkeypatch)
    worker.visiting, worker.layer = True, lambda *_: None
    with pytest.raises(RuntimeError, match="ran without them"):
        worker.run([CHUNK], sparse=False)


def test_dense_rows_of_a_mixed_batch_are_the_stock_rows(monkeypatch):
    mixed = Worker(ReferenceOps(), 3, monkeypatch).run([SHORT, LONG, CHUNK])
    stock = Worker(ReferenceOps(), 3, monkeypatch).run([SHORT, LONG, CHUNK], sparse=False)
    for (a, _), (b, _) in zip(mixed, stock, strict=True):
        assert torch.equal(a[SHORT], b[SHORT]) and torch.equal(a[CHUNK], b[CHUNK])


@pytest.mark.slow
def test_warming_up_runs_every_stage_and_leaves_nothing_behind(monkeypatch):
    worker = Worker(triton_ops(), 3, monkeypatch)
    runtime, calls = worker.runtime, []
    attended = cuda.attend_sparse

    def attend(query, kv_cache, tables, call, scale):
        attended(query, kv_cache, tables, call, scale)
        calls.append(call.output)

    monkeypatch.setattr(cuda, "attend_sparse", attend)
    cuda.prepare(runtime)
    assert len(calls) == 18 and not any(output.isnan().any() for output in calls)
    assert not runtime.has_sparse_rows and not runtime.take_counters()
    assert runtime.take_report() is None and not runtime.tables.pages.counts.any()
    pools = runtime.pools
    assert not pools.kept.any() and not worker.caches[0][0].any()
    assert all((t == -1).all() for t in (pools.page_slot, pools.slot_page, pools.slot_stamp))
    monkeypatch.setattr(cuda, "attend_sparse", attended)
    worker.exact[0].copy_(worker.caches[0])  # its private blocks were overwritten
    for outputs, _ in worker.run([LONG]):
        assert not outputs[LONG].isnan().any()


def test_decode_steps_may_be_full_graphs_and_nothing_else(monkeypatch):
    worker = Worker(ReferenceOps(), 3, monkeypatch)
    support = get_attn_cg_support(worker.groups, None)
    assert support.min_cg_support is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


def test_a_step_without_sparse_rows_has_the_stock_metadata_and_is_offered_full_graphs(monkeypatch):
    worker = Worker(ReferenceOps(), 3, monkeypatch)
    built = []

    def layer(i, metadata, *rest):
        built.append(metadata[NAMES[i]])
        return Worker.layer(worker, i, metadata, *rest)

    worker.layer = layer
    worker.run([SHORT, LONG], sparse=False)
    assert worker.uniform_tokens == 1
    assert {type(m) for m in built} == {triton_attn.TritonAttentionMetadata}
    worker.run([SHORT, LONG])
    assert worker.uniform_tokens is None
    assert type(built[-1]) is metadata.SentenceKVMetadata
    assert not worker.runtime.has_sparse_rows, "not after the step"


def test_metadata_for_a_capture_are_the_stock_ones(monkeypatch):
    worker = Worker(ReferenceOps(), 3, monkeypatch)
    lengths = torch.tensor([9, 9], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=torch.arange(3, dtype=torch.int32),
        query_start_loc_cpu=torch.arange(3, dtype=torch.int32),
        seq_lens=lengths,
        num_reqs=2,
        num_actual_tokens=2,
        max_query_len=1,
        max_seq_len=9,
        block_table_tensor=torch.zeros(2, 14, dtype=torch.int32),
        slot_mapping=torch.zeros(2, dtype=torch.int64),
    )
    builder = worker.groups[0][0].metadata_builders[0]
    captured = builder.build_for_cudagraph_capture(common)
    assert type(captured) is triton_attn.TritonAttentionMetadata
    assert captured.seq_lens.data_ptr() == lengths.data_ptr(), "vLLM's own buffer is replayed"


def test_a_step_whose_sparse_rows_nobody_planned_is_an_error(monkeypatch):
    """What a full graph replayed by mistake looks like from here."""
    worker = Worker(ReferenceOps(), 3, monkeypatch)
    worker.layer = lambda *_: None
    with pytest.raises(RuntimeError, match="the forward ran without them"):
        worker.run([LONG])


def test_a_step_without_tokens_performs_its_message(monkeypatch):
    worker = Worker(ReferenceOps(), 3, monkeypatch)
    worker.run([LONG])
    message = StepMessage(worker.step + 1, dropped=[1])
    output = SimpleNamespace(
        kv_connector_metadata=SentenceKVConnectorMetadata(message),
        has_sync_kv_loads=False,
        finished_req_ids={LONG},
    )
    with override_forward_context(SimpleNamespace()):
        worker.connector.no_forward(output)
    assert worker.runtime.tables.pages.counts[1] == 0
    assert not worker.runtime.has_sparse_rows
