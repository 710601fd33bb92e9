# SPDX-License-Identifier: Apache-2.0
"""Looks at an engine while it is under load: its metrics and its memory."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sentencekv_vllm.evaluation.prometheus import Metrics

POLL_SECONDS = 0.2
GPU_POLLS = 10  # polls between two looks at the GPU's memory, which start a process
LEVELS = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:sentencekv_sparse_requests",
    "vllm:sentencekv_host_pages_used",
)


@dataclass(frozen=True)
class Look:
    """One moment."""

    levels: dict[str, float]  # of `LEVELS`
    process_bytes: int
    gpu_bytes: int | None  # None where it was not asked for


class Watch:
    """Context manager around a load; a thread polls until it is left.

    Attributes:
        looks: of the whole load, in order.
        before, after: the metrics when it was entered and left.
    """

    def __init__(self, read: Callable[[], str], session: int) -> None:
        """Prepare.

        Args:
            read: returns the text of `/metrics`.
            session: process id of the session leader whose processes are the engine.
        """
        self.looks: list[Look] = []
        self._read, self._session = read, session
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> Self:
        self.before = Metrics(self._read())
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self.after = Metrics(self._read())

    def gained(self, name: str) -> float:
        """What a counter has gained."""
        return self.after.value(name) - self.before.value(name)

    def _poll(self) -> None:
        due = time.monotonic()
        while not self._done.is_set():
            gpu = gpu_memory() if len(self.looks) % GPU_POLLS == 0 else None
            self.looks.append(Look(levels(self._read()), process_memory(self._session), gpu))
            due = max(due + POLL_SECONDS, time.monotonic())
            self._done.wait(due - time.monotonic())


def levels(text: str) -> dict[str, float]:
    """The gauges that are watched; the rest is thrown away early, which spares the client."""
    lines = [line for line in text.splitlines() if line.startswith(LEVELS)]
    metrics = Metrics("\n".join(lines))
    return {name: metrics.value(name) for name in LEVELS}


def peak(looks: Sequence[Look], name: str) -> float:
    """Highest level of a gauge."""
    return max((look.levels[name] for look in looks), default=0.0)


def process_memory(session: int) -> int:
    """Bytes of memory of a session's processes: RSS without what is mapped from files."""
    total = 0
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
            if int(stat[3]) != session:
                continue
            status = Path("/proc", entry, "status").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        for line in status.splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += 1024 * int(line.split()[1])
    return total


def gpu_memory() -> int | None:
    """Bytes in use on all GPUs by all processes, as `nvidia-smi` says; None without a GPU."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return sum(int(line) << 20 for line in said.stdout.split())
