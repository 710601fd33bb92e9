# SPDX-License-Identifier: Apache-2.0
"""The order of copy-out, index construction, attention and reuse of memory.

On a GPU everything that writes host pages or the index is queued on one side stream, next to
the forward on the compute stream. Three rules make every reuse of memory safe without an
acknowledgement, also while later steps are being scheduled:

1. A step's writes wait for everything that was queued on the compute stream before them. So a
   block is copied after it was written, and a page that the ledger gave to another request is
   overwritten after the steps in flight have read it.
2. The side stream is one queue, so a page's next content comes after its former one, however
   late that copy runs. A request that ended may leave a copy of blocks that are somebody
   else's by then: nobody reads that page before its next owner has overwritten it.
3. The compute stream waits for the side stream in every step that reads pages or the index
   (sparse rows), and in every step from which on copied blocks may be written (blocks of a
   live request were freed). In all other steps, which are those of plain prefill, copies and
   forward overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch


class CopyStream(Protocol):
    """Where a step's writes are queued, and how the forward waits for them."""

    def writing(self) -> Any:
        """Context in which the step's writes are queued (rule 1)."""

    def join(self) -> None:
        """The forward that follows sees all writes so far (rule 3)."""


class ProgramOrder:
    """The CPU: a call returns when its work is done."""

    @contextmanager
    def writing(self) -> Iterator[None]:
        yield

    def join(self) -> None:
        return None


class SideStream:
    """A CUDA stream of its own, the only one that writes pages and index (rule 2).

    Args:
        streams: `torch.cuda`, or what a test has in its place.
    """

    def __init__(self, device: torch.device, streams: Any = torch.cuda) -> None:
        self._streams = streams
        self._device = device
        self._side = streams.Stream(device)

    @contextmanager
    def writing(self) -> Iterator[None]:
        self._side.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(self._side):
            yield

    def join(self) -> None:
        self._streams.current_stream(self._device).wait_stream(self._side)


def copy_stream(device: torch.device) -> CopyStream:
    return SideStream(device) if device.type == "cuda" else ProgramOrder()
