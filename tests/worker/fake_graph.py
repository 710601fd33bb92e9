# SPDX-License-Identifier: Apache-2.0
"""A graph without a GPU: the work it has seen, done again on the tensors it has seen."""

from __future__ import annotations

from sentencekv_vllm.worker.graphs import Graphs


class FakeGraph:
    """As a CUDA graph, it keeps the tensors of the step that was captured, not of the next."""

    made: list[FakeGraph] = []  # noqa: RUF012  # emptied by the tests that count

    def __init__(self) -> None:
        self.work, self.replays = None, 0
        FakeGraph.made.append(self)

    def capture(self, work):
        assert self.work is None, "captured twice"
        self.work = work

    def replay(self):
        self.replays += 1
        Graphs._working, before = True, Graphs._working  # a replay makes no graphs
        self.work()
        Graphs._working = before
