# SPDX-License-Identifier: Apache-2.0
"""The order of copies of a visiting history and of the attention that reads it.

A history visits the device one layer at a time, in as many places as there are halves: while a
layer attends to what lies in one, the next layer's is copied to the other. Four rules order the
side stream that copies with the compute stream; those of `copy_stream` hold besides.

1. At the start of a step the side stream waits for the compute stream. That has joined copy-out
   (a step with visits always does), so the pages are there; and whatever used the staging blocks
   before them, as somebody's blocks or in the step before, is done.
2. A layer's attention waits for the event of its copies.
3. Copies into a half wait for the event after the attention that has read it, `halves` layers
   before.
4. The compute stream has then waited for all copies when the forward ends, so that a later step
   may give the staging blocks to anybody.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class VisitStream(Protocol):
    """Where the copies of visiting layers are queued."""

    halves: int  # layers whose history is on the device at once

    def start(self) -> None:
        """Before the first copies of a step (rule 1)."""

    def bring(self, layer: int, copy: Callable[[], None]) -> None:
        """Queue a layer's copies (rule 3)."""

    def wait(self, layer: int) -> None:
        """The attention that follows sees the layer's copies (rule 2)."""

    def read(self, layer: int) -> None:
        """The layer's attention is queued."""


class VisitsInProgramOrder:
    """The CPU: a call returns when its work is done."""

    halves = 1

    def start(self) -> None:
        return None

    def bring(self, layer: int, copy: Callable[[], None]) -> None:
        copy()

    def wait(self, layer: int) -> None:
        return None

    def read(self, layer: int) -> None:
        return None


class VisitSideStream:
    """A CUDA stream of its own.

    Args:
        streams: `torch.cuda`, or what a test has in its place.
    """

    halves = 2

    def __init__(self, device: torch.device, num_layers: int, streams: Any = torch.cuda) -> None:
        self._streams, self._device = streams, device
        self._side = streams.Stream(device)
        self._ready = [streams.Event() for _ in range(num_layers)]
        self._done = [streams.Event() for _ in range(num_layers)]

    def start(self) -> None:
        self._side.wait_stream(self._streams.current_stream(self._device))

    def bring(self, layer: int, copy: Callable[[], None]) -> None:
        with self._streams.stream(self._side):
            if layer >= self.halves:
                self._side.wait_event(self._done[layer - self.halves])
            copy()
            self._ready[layer].record(self._side)

    def wait(self, layer: int) -> None:
        self._streams.current_stream(self._device).wait_event(self._ready[layer])

    def read(self, layer: int) -> None:
        self._done[layer].record(self._streams.current_stream(self._device))


def visit_stream(device: torch.device, num_layers: int) -> VisitStream:
    on_gpu = device.type == "cuda"
    return VisitSideStream(device, num_layers) if on_gpu else VisitsInProgramOrder()
