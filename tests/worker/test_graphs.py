# SPDX-License-Identifier: Apache-2.0
"""Done, then captured, then replayed."""

from __future__ import annotations

import pytest
import torch

from sentencekv_vllm.worker.graphs import CudaGraphs, Graphs

from .fake_graph import FakeGraph


def test_work_is_done_once_a_call_and_captured_at_the_second():
    FakeGraph.made.clear()
    graphs, done = Graphs(FakeGraph), []
    for i in range(4):
        graphs.run("a", lambda i=i: done.append(i))
        assert len(FakeGraph.made) == (i > 0)
    assert done == [0, 1, 1, 1], "a replay does what was captured"
    graphs.run("b", lambda: done.append("b"))
    assert done[-1] == "b" and len(FakeGraph.made) == 1


def test_without_a_graph_the_work_of_each_call_is_done():
    graphs, done = Graphs(None), []
    for i in range(3):
        graphs.run("a", lambda i=i: done.append(i))
    assert done == [0, 1, 2]


def test_what_belongs_to_the_tensors_is_made_once():
    graphs = Graphs(None)
    first = graphs.once("buffers", lambda: [1])
    assert graphs.once("buffers", lambda: [2]) is first


def test_work_inside_of_other_work_is_part_of_its_graph():
    FakeGraph.made.clear()
    outer, inner, done = Graphs(FakeGraph), Graphs(FakeGraph), []

    def work():
        inner.run("inner", lambda: done.append("inner"))

    for _ in range(3):
        outer.run("outer", work)
    assert done == ["inner"] * 3 and len(FakeGraph.made) == 1
    inner.run("inner", lambda: done.append("alone"))
    assert done[-1] == "alone" and len(FakeGraph.made) == 1, "its own first time"


def test_work_that_fails_leaves_graphs_as_they_were():
    graphs, done = Graphs(FakeGraph), []

    def fail():
        raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"):
        graphs.run("a", fail)
    FakeGraph.made.clear()
    for _ in range(2):
        graphs.run("b", lambda: done.append("b"))
    assert len(FakeGraph.made) == 1, "later work is recorded"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_replays_what_was_captured():
    device = torch.device("cuda")
    graphs, total, step = Graphs(CudaGraphs(device)), torch.zeros(3, device=device), 0
    addend = torch.zeros(3, device=device)
    for step in range(1, 6):
        addend.fill_(step)
        graphs.run("add", lambda: total.add_(2 * addend))
    assert total.tolist() == [30.0] * 3
