# SPDX-License-Identifier: Apache-2.0
"""Small tables from host to device, and small results back, without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; Triton and vectorised loads want it

Array = npt.NDArray[Any]


class Packing:
    """Places for arrays of several types and shapes in one buffer of bytes."""

    def __init__(self, shapes: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> None:
        self._shapes = shapes
        self._ranges: list[tuple[int, int]] = []
        end = 0
        for shape, dtype in shapes:
            start = -(-end // ALIGNMENT) * ALIGNMENT
            end = start + prod(shape) * dtype.itemsize
            self._ranges.append((start, end))
        self.num_bytes = end

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The arrays inside `buffer`, [num_bytes] uint8."""
        return [
            buffer[start:end].view(dtype).view(shape)
            for (start, end), (shape, dtype) in zip(self._ranges, self._shapes, strict=True)
        ]


def upload(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """Arrays as tensors of `device`, in one asynchronous copy; on the CPU they share memory.

    The pinned staging buffer comes from torch's caching allocator, which gives it to nobody
    else before the copy is done.
    """
    tensors = [torch.from_numpy(array) for array in arrays]
    return tensors if device.type == "cpu" else upload_packed(tensors, device)


def upload_packed(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors through one staging buffer."""
    packing = Packing([(tuple(t.shape), t.dtype) for t in tensors])
    pinned = device.type == "cuda"
    staging = torch.empty(packing.num_bytes, dtype=torch.uint8, pin_memory=pinned)
    for place, tensor in zip(packing.views(staging), tensors, strict=True):
        place.copy_(tensor)
    return packing.views(staging.to(device, non_blocking=True))


class Totals:
    """What the layers of a step add up, on the device, in one piece of memory."""

    def __init__(self, num_rows: int, num_stages: int, device: torch.device) -> None:
        self.packing = Packing(
            [
                ((num_rows,), torch.int64),
                ((num_rows,), torch.int64),
                ((num_stages,), torch.int64),
                ((num_rows,), torch.float32),
            ]
        )
        self.buffer = torch.zeros(self.packing.num_bytes, dtype=torch.uint8, device=device)
        self.hits, self.misses, self.stage_ns, self.coverage = self.packing.views(self.buffer)

    def zero(self) -> None:
        self.buffer.zero_()


class Tallies:
    """A step's totals on their way to the host, in one copy."""

    def __init__(self, totals: Totals, num_rows: int, shared: bool = False) -> None:
        """Take them over.

        Args:
            num_rows: the first ones, which belong to requests.
            shared: a later step adds up in the same memory.
        """
        self._packing, self._buffer = totals.packing, totals.buffer
        self._num_rows, self._shared = num_rows, shared
        self._copied: torch.cuda.Event | None = None

    def start_fetch(self) -> None:
        """Queue the copy; on the CPU there is nothing to wait for."""
        if self._buffer.is_cuda:
            on_host = torch.empty(self._packing.num_bytes, dtype=torch.uint8, pin_memory=True)
            on_host.copy_(self._buffer, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
            self._buffer = on_host
        elif self._shared:
            self._buffer = self._buffer.clone()

    def fetched(self) -> tuple[Array, Array, Array, Array]:
        """hits, misses, stage_ns, coverage; waits for the copy where it is not done yet."""
        if self._copied is not None:
            self._copied.synchronize()
        hits, misses, stage_ns, coverage = (t.numpy() for t in self._packing.views(self._buffer))
        n = self._num_rows
        return hits[:n], misses[:n], stage_ns, coverage[:n]
