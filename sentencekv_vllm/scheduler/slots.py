# SPDX-License-Identifier: Apache-2.0
"""Rows of the workers' tables, and the requests that own them."""

from __future__ import annotations

from .page_pool import PagePool
from .request_state import RequestState


class Slots:
    """One slot for each tracked request."""

    def __init__(self, count: int) -> None:
        self.owners: dict[int, RequestState] = {}
        self.step = 0  # of the last message
        self._free = PagePool(count)
        self._dropped: list[int] = []

    @property
    def num_used(self) -> int:
        return self._free.num_used

    def track(self, state: RequestState) -> bool:
        """Give the request a slot; False where all are taken."""
        slot = self._free.take(1)
        if slot is None:
            return False
        state.memory.slot, state.memory.tracked_since = slot[0], self.step
        self.owners[slot[0]] = state
        return True

    def drop(self, state: RequestState) -> None:
        """Take the request's slot back, if it has one; the workers are told."""
        slot = state.memory.slot
        if slot >= 0:
            self._free.give([slot])
            del self.owners[slot]
            self._dropped.append(slot)

    def take_dropped(self) -> list[int]:
        """Slots dropped since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped
