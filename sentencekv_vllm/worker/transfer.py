# SPDX-License-Identifier: Apache-2.0
"""Small tables from host to device, and small results back, without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; Triton and vectorised loads want it

STAGING_TURNS = 4  # more than the steps in flight

Array = npt.NDArray[Any]

NUMPY = {
    torch.uint8: np.dtype(np.uint8),
    torch.bool: np.dtype(np.bool_),
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
    torch.float32: np.dtype(np.float32),
}


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

    def arrays(self, buffer: Tensor) -> list[Array]:
        """`views` of a buffer in host memory, for less of the host's time."""
        memory = buffer.numpy()
        return [
            memory[start:end].view(NUMPY[dtype]).reshape(shape)
            for (start, end), (shape, dtype) in zip(self._ranges, self._shapes, strict=True)
        ]


class Staging:
    """Host memory of a packing that is copied to the device in every step.

    It has several buffers, pinned where the device is a GPU, since the copy of a step may wait
    behind the work of the steps before it.
    """

    def __init__(self, packing: Packing, device: torch.device) -> None:
        self._on_gpu, self._turn = device.type == "cuda", 0
        buffers = [
            torch.zeros(packing.num_bytes, dtype=torch.uint8, pin_memory=self._on_gpu)
            for _ in range(STAGING_TURNS)
        ]
        self._turns = [(buffer, packing.arrays(buffer)) for buffer in buffers]
        self._copied: list[torch.cuda.Event | None] = [None] * STAGING_TURNS

    def next(self) -> list[Array]:
        """The arrays to fill for a step; what they hold is that of an earlier one."""
        self._turn = (self._turn + 1) % STAGING_TURNS
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()  # done long ago, unless the host runs far ahead
        return self._turns[self._turn][1]

    def send(self, target: Tensor) -> None:
        """Queue the copy of what `next` gave."""
        target.copy_(self._turns[self._turn][0], non_blocking=True)
        if self._on_gpu:
            event = self._copied[self._turn] or torch.cuda.Event()
            event.record()
            self._copied[self._turn] = event


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
        hits, misses, stage_ns, coverage = self._packing.arrays(self._buffer)
        n = self._num_rows
        return hits[:n], misses[:n], stage_ns, coverage[:n]
