# SPDX-License-Identifier: Apache-2.0
"""Notes what a runtime selects. Nothing is noted, and nothing is slower, where nobody records."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .trace import ABSENT, MISS, MOST_BLOCKS, Trace

if TYPE_CHECKING:
    from ..worker.plan import StepPlan
    from ..worker.runtime import Runtime

MOST_BYTES = 16 << 20
"""Of a trace's entries: some 1000 steps of 32 layers with 8 KV heads that select 32 blocks."""


class Recorder:
    """Collects the steps of the one request that decodes."""

    def __init__(self, runtime: Runtime, most_bytes: int = MOST_BYTES) -> None:
        self._runtime, self._rank = runtime, runtime.rank
        self._room, self._left_out = most_bytes // 2, 0  # entries; steps
        self._step = -1
        self._recording = False
        self._lengths: list[int] = []
        self._history: list[tuple[int, int]] = []
        self._selected: list[list[NDArray[np.uint16]]] = []  # [T][L] of [H, K]
        self._estimate: list[list[float]] = []

    def rank(self, plan: StepPlan, layer: int, query: Tensor) -> Tensor:
        """In place of the runtime's.

        Raises:
            ValueError: several requests decode, or one has more blocks than can be named.
        """
        if len(plan.unranked) != 1:
            raise ValueError(f"one request can be recorded at a time, got {len(plan.unranked)}")
        if plan.unranked[0]:
            return self._rank(plan, layer, query)
        batch, runtime = plan.batch, self._runtime
        lo, hi = int(batch.history_lo[0]), int(batch.history_hi[0])
        if plan.step != self._step:
            self._begin(plan, lo, hi)
        if not self._recording:
            return self._rank(plan, layer, query)
        pools = runtime.pools.layers[layer]
        pages = batch.pages[0, lo:hi].long()
        resident = pools.page_slot[pages] >= 0  # [n, H]
        before = plan.out.coverage.clone()
        tables = self._rank(plan, layer, query)
        slots = pools.page_slot[pages].long()
        heads = torch.arange(slots.shape[1], device=slots.device)
        stamps = pools.slot_stamp[slots.clamp(min=0), heads]
        taken = (slots >= 0) & (stamps == batch.step)
        self._selected[-1].append(_entries(lo, taken.cpu().numpy(), resident.cpu().numpy()))
        self._estimate[-1].append(float((plan.out.coverage - before)[0]))
        return tables

    def _begin(self, plan: StepPlan, lo: int, hi: int) -> None:
        """A step, unless there is no more room: the later ones are counted only."""
        if hi > MOST_BLOCKS:
            raise ValueError(f"a request can be recorded up to {MOST_BLOCKS} blocks, got {hi}")
        geometry = self._runtime.geometry
        budget = int(plan.batch.budget_blocks[0])
        self._step = plan.step
        self._room -= geometry.num_layers * geometry.num_kv_heads * budget
        self._recording = self._room >= 0
        if not self._recording:
            self._left_out += 1
            return
        read = int(plan.seq_lens[0])
        self._lengths.append(read + (hi - lo - budget) * geometry.block_size)
        self._history.append((lo, hi))
        self._selected.append([])
        self._estimate.append([])

    def trace(self) -> Trace:
        """What was noted until now."""
        g = self._runtime.geometry
        width = max((e.shape[1] for step in self._selected for e in step), default=0)
        shape = (len(self._selected), g.num_layers, g.num_kv_heads, width)
        selected = np.full(shape, ABSENT, np.uint16)
        for t, step in enumerate(self._selected):
            for layer, entries in enumerate(step):
                selected[t, layer, :, : entries.shape[1]] = entries
        return Trace(
            block_size=g.block_size,
            layers=tuple(map(_number, self._runtime.layer_index, range(g.num_layers))),
            lengths=np.array(self._lengths, np.int32),
            history=np.array(self._history, np.int32).reshape(-1, 2),
            selected=selected,
            estimate=np.array(self._estimate, np.float32).reshape(shape[:2]),
            left_out=self._left_out,
        )


def _number(name: str, index: int) -> int:
    """Of a layer, as in `model.layers.7.self_attn.attn`."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else index


def _entries(lo: int, taken: NDArray[np.bool_], resident: NDArray[np.bool_]) -> NDArray[np.uint16]:
    """[H, K] from [n, H] of blocks lo, lo + 1, ...; see `Trace.selected`."""
    rows = [np.flatnonzero(head) for head in taken.T]
    found = np.full((len(rows), max(map(len, rows))), ABSENT, np.uint16)
    for h, row in enumerate(rows):
        found[h, : len(row)] = row + lo + np.where(resident[row, h], 0, MISS)
    return found


@contextmanager
def recording(runtime: Runtime, most_bytes: int = MOST_BYTES) -> Iterator[Recorder]:
    """Every sparse step while the context is open; the runtime is left as it was."""
    recorder = Recorder(runtime, most_bytes)
    runtime.rank = recorder.rank  # type: ignore[method-assign]
    try:
        yield recorder
    finally:
        del runtime.rank
