# SPDX-License-Identifier: Apache-2.0
"""Times on a GPU: CUDA graph replays between events, with cold caches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLUSH_BYTES = 256 * 2**20  # more than any L2
GIB = 2**30
QUANTILES = torch.tensor([0.2, 0.5, 0.8])


@dataclass(frozen=True)
class Timing:
    """Percentiles over the repeats, in microseconds."""

    p20: float
    p50: float
    p80: float


def capture(fn: Callable[[], object], restore: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of `fn`; `restore` runs before each of the calls that warm it up."""
    for _ in range(3):
        restore()
        fn()
    restore()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph


class Clock:
    """Times calls; each repeat starts with a cold L2 and from the state `restore` makes."""

    def __init__(self, repeats: int) -> None:
        self._repeats = repeats
        self._stream = torch.cuda.Stream()
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def time(
        self,
        fn: Callable[[], object],
        restore: Callable[[], None] = lambda: None,
        replay: bool = True,
    ) -> Timing:
        """Replays of a graph of `fn`, so that neither Python nor launches are counted.

        Args:
            replay: False for calls that a graph cannot hold; their launches do count.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # batched copies refuse the default stream
            call = capture(fn, restore).replay if replay else fn
            events = []
            for _ in range(self._repeats):
                restore()
                self._flush.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                events.append((start, end))
        torch.cuda.synchronize()
        times = torch.tensor([1e3 * start.elapsed_time(end) for start, end in events])
        return Timing(*(float(q) for q in times.quantile(QUANTILES)))

    def host(self, call: Callable[[], object]) -> Timing:
        """How long the host is busy until `call` returns, its work only queued."""
        times = []
        for _ in range(self._repeats):
            torch.cuda.synchronize()  # an empty queue never blocks the host
            start = time.perf_counter_ns()
            call()
            times.append((time.perf_counter_ns() - start) / 1e3)
        torch.cuda.synchronize()
        return Timing(*(float(q) for q in torch.tensor(times).quantile(QUANTILES)))


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second of plain copies, measured in this run."""

    memory: float  # read or written in GPU memory
    to_gpu: float  # from pinned memory
    to_host: float

    def __str__(self) -> str:
        return (
            f"copies: {self.memory / 1e9:.0f} GB/s in GPU memory, {self.to_gpu / 1e9:.1f} GB/s "
            f"from and {self.to_host / 1e9:.1f} GB/s to pinned memory"
        )


def measure_bandwidth(clock: Clock, copy_bytes: int = GIB) -> Bandwidth:
    device = torch.empty(copy_bytes, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(device)
    pinned = torch.empty(copy_bytes // 4, dtype=torch.uint8, pin_memory=True)
    part = device[: len(pinned)]

    def rate(target: torch.Tensor, source: torch.Tensor) -> float:
        elapsed = clock.time(lambda: target.copy_(source, non_blocking=True)).p50
        return 1e6 * len(target) / elapsed

    return Bandwidth(2 * rate(other, device), rate(part, pinned), rate(pinned, part))
