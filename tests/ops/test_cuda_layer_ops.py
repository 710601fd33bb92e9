# SPDX-License-Identifier: Apache-2.0
"""`CudaOps`, `TritonOps` and the definition leave the same tables, pools and tallies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sentencekv_vllm.ops import cuda_layer_ops
from sentencekv_vllm.ops.layer_ops import DecodeOutputs, ReferenceOps
from sentencekv_vllm.ops.quantize_query import CODE_LEVELS, MEAN_LEVELS
from sentencekv_vllm.triton_kernels.layer_ops import TritonOps
from sentencekv_vllm.types import IndexKind

STATE = ("page_slot", "slot_page", "slot_stamp", "kept", "page_kept")


def outputs(case, device) -> DecodeOutputs:
    requests, heads = len(case.batch.pages), case.geometry.num_kv_heads
    return DecodeOutputs(
        head_tables=torch.full((requests, heads, 64), -7, dtype=torch.int32, device=device),
        hits=torch.zeros(requests, dtype=torch.int64, device=device),
        misses=torch.zeros(requests, dtype=torch.int64, device=device),
        coverage=torch.zeros(requests, device=device),
        stage_ns=torch.zeros(4, dtype=torch.int64, device=device),
    )


class Twin:
    """One implementation on its own copy of a case."""

    def __init__(self, make_ops, case, device, workspace) -> None:
        self.case, self.out = case.to(device), outputs(case, device)
        self.ops = make_ops(workspace(case, device))

    def decode(self, step: int, query: torch.Tensor) -> None:
        case = self.case
        batch = replace(case.batch, step=step)
        if not (query.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.ops.set_step(step)  # a graph would replay the number it saw
        self.ops.begin_step(batch)
        self.ops.decode_layer(case.geometry, case.pools, batch, query, self.out)

    def reuse(self) -> None:
        """The last selection, in a layer where nothing is resident."""
        for name in ("page_slot", "slot_page", "slot_stamp"):
            getattr(self.case.pools, name).fill_(-1)
        self.ops.reuse_selection(self.case.pools, replace(self.case.batch, step=7), self.out)

    def state(self) -> dict[str, torch.Tensor]:
        pools = {name: x for name in STATE if (x := getattr(self.case.pools, name)) is not None}
        cache = self.case.pools.cache.view(torch.int16)  # bytes: unused slots are NaN
        tensors = {**vars(self.out), **pools, "cache": cache}
        return {name: tensor.clone() for name, tensor in tensors.items() if name != "stage_ns"}


def drifting_queries(case, device, count):
    """None has a mapped channel where two orders of summation would round apart."""
    generator = torch.Generator().manual_seed(3)
    while count:
        drift = torch.randn(case.query.shape, generator=generator).to(case.query.dtype)
        query = case.query + drift / 4
        if far_from_ties(query, case):
            count -= 1
            yield query.to(device)


def far_from_ties(query, case) -> bool:
    basis, heads = case.pools.basis, case.geometry.num_kv_heads
    mapped = query.double().unflatten(1, (heads, -1)) @ basis.query_map.double()
    coded = mapped[..., : case.geometry.code_width // basis.bits]
    for x, levels in ((mapped, MEAN_LEVELS), (coded, CODE_LEVELS[basis.bits])):
        level = x / (x.abs().amax(-1, keepdim=True) / levels)
        if float((level - level.floor() - 0.5).abs().min()) < 1e-5:
            return False
    return True


def make_case(build):
    rows = [
        build.row(tokens=260, retention=5.0),
        build.row(tokens=0),
        build.row(tokens=200, budget=99),
        build.row(tokens=150, budget=3, kind=IndexKind.CENTROID),
        build.row(tokens=170, budget=3, kind=IndexKind.RANDOM),
    ]
    return build(*rows, private=13, head_dim=32, group=2)


def assert_same(one: Twin, other: Twin, where: object) -> None:
    a, b = one.state(), other.state()
    for name in a:
        if name == "coverage":
            torch.testing.assert_close(a[name].cpu(), b[name].cpu(), equal_nan=True)
        else:
            assert torch.equal(a[name].cpu(), b[name].cpu()), (name, where)


def definition(_workspace) -> ReferenceOps:
    return ReferenceOps()


def test_steps_equal_tritons_and_the_definitions(build, cuda_kernels, workspace) -> None:
    case = make_case(build)
    cuda = Twin(cuda_layer_ops.CudaOps, case, cuda_kernels, workspace)
    others = [
        Twin(TritonOps, case, cuda_kernels, workspace),
        Twin(definition, case, "cpu", workspace),
    ]
    for step, query in enumerate(drifting_queries(case, cuda_kernels, 3), start=5):
        cuda.decode(step, query)
        for twin in others:
            twin.decode(step, query.to(twin.case.query.device))
            assert_same(twin, cuda, step)
    cuda.reuse()
    for twin in others:
        twin.reuse()
        assert_same(twin, cuda, "reuse")
    hits, misses = (int(getattr(cuda.out, name).sum()) for name in ("hits", "misses"))
    assert hits > 0 and misses > 0


@pytest.mark.parametrize("group", [1, 5, 9])
def test_a_batch_of_blocks_alone_reads_no_sentence(build, cuda_kernels, workspace, group) -> None:
    """Nor does it need any; groups of more than eight are Triton's."""
    rows = [build.row(tokens=260, retention=20.0), build.row(tokens=0), build.row(tokens=333)]
    case = build(*rows, head_dim=32, group=group, block_size=32, vectors=0)
    case.batch.num_sentences.zero_()
    case.batch.sentence_ends.fill_(2**30)
    case = replace(case, batch=replace(case.batch, token_codes_only=True))
    twins = [
        Twin(make, case, device, workspace)
        for make, device in ((cuda_layer_ops.CudaOps, cuda_kernels), (definition, "cpu"))
    ]
    for step, query in enumerate(drifting_queries(case, cuda_kernels, 3), start=5):
        for twin in twins:
            twin.decode(step, query.to(twin.case.query.device))
        assert_same(*twins, step)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["TritonOps", "CudaOps"])
def test_a_graph_replay_equals_the_eager_step(build, cuda_kernels, workspace, name) -> None:
    make = getattr(cuda_layer_ops, name)
    case = make_case(build)
    eager, replayed = (Twin(make, case, cuda_kernels, workspace) for _ in range(2))
    queries = list(drifting_queries(case, cuda_kernels, 4))
    query = queries[0].clone()
    for twin in (eager, replayed):
        twin.decode(5, query)  # compiles what a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.decode(6, query)
    for step, current in enumerate(queries[1:], start=6):
        query.copy_(current)
        eager.decode(step, query)
        replayed.ops.set_step(step)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(eager, replayed, step)


def test_without_the_library_triton_takes_over(build, workspace, monkeypatch) -> None:
    work = workspace(make_case(build), "cpu")
    monkeypatch.setattr(cuda_layer_ops, "library", lambda: None)
    assert cuda_layer_ops.gpu_layer_ops(work, False).name == "triton"
    monkeypatch.setattr(cuda_layer_ops, "library", lambda: object())
    assert cuda_layer_ops.gpu_layer_ops(work, False).name == "cuda"
    assert cuda_layer_ops.gpu_layer_ops(work, True).name == "triton", "the gather copies bytes"
