# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of our own work: recorded once, replayed with new content in the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch

Work = Callable[[], None]


class CannotRecord(RuntimeError):
    """Work could not be captured, and was not done."""


class Graph(Protocol):
    """Work on tensors that stay where they are."""

    def capture(self, work: Work) -> None:
        """Record what `work` queues, without doing it."""

    def replay(self) -> None:
        """Do it, with what the tensors hold now."""


class Graphs:
    """The graphs of one set of tensors, by what they do.

    The first time a piece of work comes it is done as it is: that compiles its kernels and
    allocates what it keeps. The second time it is recorded and replayed, later only replayed.
    Work that comes while other work is being done, of whatever tensors, is part of that one.
    """

    _working = False  # of the process: a worker's steps run on one thread

    def __init__(self, new_graph: Callable[[], Graph] | None) -> None:
        """Start without graphs.

        Args:
            new_graph: makes an empty graph; None: nothing is recorded.
        """
        self._new_graph = new_graph
        self._graphs: dict[Hashable, Graph | None] = {}
        self._kept: dict[Hashable, Any] = {}

    @staticmethod
    def is_working() -> bool:
        """Inside of other work: tensors that it makes stay where they are in a replay."""
        return Graphs._working

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What belongs to the same tensors, made when it is first asked for."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def run(self, key: Hashable, work: Work) -> None:
        """Do `work`, which must be the same for a key but for the content of its tensors.

        Raises:
            CannotRecord: the device refused to capture it.
        """
        if Graphs._working:
            work()
            return
        graph = self._graphs.get(key)
        if graph is None:
            record = self._new_graph is not None and key in self._graphs
            self._graphs[key] = None
            Graphs._working = True
            try:
                if not record:
                    work()
                    return
                assert self._new_graph is not None
                graph = self._new_graph()
                try:
                    graph.capture(work)
                except RuntimeError as error:
                    raise CannotRecord(str(error)) from error
            finally:
                Graphs._working = False
            self._graphs[key] = graph
        graph.replay()


class CudaGraphs:
    """Makes graphs that share one memory pool.

    They may share it because all are replayed on one stream, one after the other, and nothing
    that they allocate is read after a replay.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self) -> CudaGraph:
        return CudaGraph(self._pool, self._stream)


class CudaGraph:
    """One `torch.cuda.CUDAGraph`, captured while others work on the device.

    `torch.cuda.graph` would synchronise and collect garbage for each of them, which a server
    cannot afford between two steps.
    """

    def __init__(self, pool: Any, stream: torch.cuda.Stream) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool, self._stream = pool, stream

    def capture(self, work: Work) -> None:
        with torch.cuda.stream(self._stream):
            # Other threads (vLLM's copies to the host) may go on calling the driver.
            self._graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                self._graph.capture_end()

    def replay(self) -> None:
        self._graph.replay()
