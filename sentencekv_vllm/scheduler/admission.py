# SPDX-License-Identifier: Apache-2.0
"""Who of the waiting requests may begin, and whether as a visitor: GPU blocks and host pages."""

from __future__ import annotations

from .copying import Copying
from .limits import Limits
from .page_pool import PagePool
from .request_state import RequestState
from .visiting import FreeBlocks, Visiting


class Admission:
    """Decides before a request's first allocation, and books what it then holds."""

    def __init__(
        self, limits: Limits, pages: PagePool, copying: Copying, visiting: Visiting
    ) -> None:
        self._limits, self._pages = limits, pages
        self._copying, self._visiting = copying, visiting
        # Who can be served by visits only and waits for host pages, first come first: they are
        # taken at once, and others that take them in small portions would always be faster.
        self.line: dict[str, RequestState] = {}
        self.visitors = 0  # admitted so far

    def blocks(
        self, state: RequestState, needed: int, found_blocks: int, pool: FreeBlocks
    ) -> int | None:
        """GPU blocks that must be free before a request begins; None: it waits for host pages.

        Decides whether it visits.

        Args:
            needed: blocks that it has to draw for all of its tokens.
            found_blocks: of the prefix cache, that it would take.
        """
        if self.waits(state, pool.usable):
            return None
        never = self._visiting.never_fits(state, pool.usable)
        state.memory.visits = never or (
            needed > pool.free - pool.promised
            and self._visiting.gains(state, needed, found_blocks)
            and self._copying.all_pages(state) <= self._pages.num_free
        )
        if state.memory.visits:
            return self._visiting.need(state, found_blocks) + pool.promised + pool.undrawn
        if self._visiting.admitted:  # a visitor may free what both hold: then it is this one's
            needed = max(needed, self._visiting.whole_blocks(state))
        return needed + pool.promised

    def waits(self, state: RequestState, usable: int) -> bool:
        """A waiting request needs host pages that are not there, or that a visitor came first for.

        Args:
            usable: blocks of the GPU pool.
        """
        if state.memory.admitted:
            return False
        if not self._visiting.never_fits(state, usable):
            if not self._copying.takes_pages(state):
                return False
            needed = self._copying.pages_at_admission(state)
            return bool(self.line) or self._pages.num_free < needed <= self._pages.num_pages
        waits = next(iter(self.line), state.request_id) != state.request_id
        if self._copying.segmented(state, 0):
            self._copying.fit_rows(state)
            waits = waits or self._pages.num_free < self._copying.all_pages(state)
        else:
            waits = True
        if waits:  # until it is admitted
            self.line.setdefault(state.request_id, state)
        return waits

    def steps_aside(self, state: RequestState, usable: int) -> bool:
        """Others are looked at although the request waits: the first of the line may be among
        them, or it waits for pages of all of its prompt, which others do not need."""
        return self.waits(state, usable) and bool(self.line)

    def reserve(self, state: RequestState) -> None:
        """At the first allocation: hold the prompt's pages, so that copy-out cannot fail."""
        if state.memory.admitted:
            return
        state.memory.admitted = True
        self.line.pop(state.request_id, None)
        if state.memory.visits:
            needed = self._copying.all_pages(state)
            self.visitors += 1
        else:
            needed = self._copying.pages_at_admission(state)
        self._visiting.begin(state)
        if 0 < needed <= self._pages.num_free:
            taken = self._pages.take(needed)
            assert taken is not None
            state.memory.reserved = taken

    def end(self, state: RequestState) -> None:
        """The request gives everything back, or has ended in the queue."""
        self.line.pop(state.request_id, None)
        self._visiting.end(state)
