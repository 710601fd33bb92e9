# SPDX-License-Identifier: Apache-2.0
"""`CudaOps` and `TritonOps` are twins: the same tables, pools and tallies, step after step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sentencekv_vllm.ops import cuda_layer_ops
from sentencekv_vllm.ops.layer_ops import DecodeOutputs
from sentencekv_vllm.triton_kernels.layer_ops import TritonOps

STATE = ("page_slot", "slot_page", "slot_stamp", "kept")


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
        self.ops.decode_layer(case.geometry, case.pools, batch, query, case.rotation, self.out)

    def reuse(self) -> None:
        """The last selection, in a layer where nothing is resident."""
        for name in ("page_slot", "slot_page", "slot_stamp"):
            getattr(self.case.pools, name).fill_(-1)
        self.ops.reuse_selection(self.case.pools, replace(self.case.batch, step=6), self.out)

    def state(self) -> dict[str, torch.Tensor]:
        pools = {name: getattr(self.case.pools, name) for name in STATE}
        cache = self.case.pools.cache.view(torch.int16)  # bytes: unused slots are NaN
        tensors = {**vars(self.out), **pools, "cache": cache}
        return {name: tensor.clone() for name, tensor in tensors.items()}


def drifting_queries(case, device, count):
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        drift = torch.randn(case.query.shape, generator=generator).to(case.query.dtype)
        yield (case.query + drift / 4).to(device)


def make_case(build):
    rows = [
        build.row(tokens=260, retention=5.0),
        build.row(tokens=0),
        build.row(tokens=200, budget=99),
        build.row(tokens=150, budget=3),
    ]
    return build(*rows, private=13, head_dim=32, group=2)


def assert_same(one: Twin, other: Twin, where: object) -> None:
    a, b = one.state(), other.state()
    for name in a:
        if name == "coverage":
            torch.testing.assert_close(a[name], b[name], equal_nan=True)
        else:
            assert torch.equal(a[name], b[name]), (name, where)


def test_steps_equal_tritons(build, cuda_kernels, workspace) -> None:
    case = make_case(build)
    twins = [
        Twin(make, case, cuda_kernels, workspace) for make in (TritonOps, cuda_layer_ops.CudaOps)
    ]
    for step, query in enumerate(drifting_queries(case, cuda_kernels, 2), start=5):
        for twin in twins:
            twin.decode(step, query)
        assert_same(*twins, step)
    for twin in twins:
        twin.reuse()
    assert_same(*twins, "reuse")
    hits, misses = (int(getattr(twins[0].out, name).sum()) for name in ("hits", "misses"))
    assert hits > 0 and misses > 0


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
