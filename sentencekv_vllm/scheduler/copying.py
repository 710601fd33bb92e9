# SPDX-License-Identifier: Apache-2.0
"""Which full blocks are copied out, into which host pages, and the sentences they hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .limits import Limits
from .page_pool import PagePool
from .protocols import Block, Segmentation
from .reasons import Reason
from .request_state import Memory, RequestState
from .slots import Slots


class Copying:
    """Orders the copies of a step, within its quota."""

    def __init__(
        self, limits: Limits, pages: PagePool, segmentation: Segmentation, slots: Slots
    ) -> None:
        self._limits, self._pages = limits, pages
        self._segmentation, self._slots = segmentation, slots
        self._quota = limits.copy_blocks_per_step
        self.coarsened = 0  # requests whose short sentences were joined

    def new_step(self) -> None:
        self._quota = self._limits.copy_blocks_per_step

    def segmented(self, state: RequestState, processed: int) -> bool:
        if state.block_groups:
            return True
        if state.segmentation == "none":
            prompt = state.tokens(0, state.request.num_prompt_tokens)
            self._segmentation.submit(state.request_id, prompt)
            state.segmentation = "submitted"
        if state.segmentation == "submitted":
            decoding = processed >= state.request.num_prompt_tokens
            ends = self._segmentation.poll(state.request_id, urgent=decoding)
            if ends is None:
                return False
            state.ends, state.segmentation = ends, "done"
        return True

    def copy_out(self, state: RequestState, processed: int, blocks: Sequence[Block]) -> None:
        """Order the copies of full blocks that have none yet, as many as the step allows."""
        n, memory = self._limits.block_size, state.memory
        first = len(memory.pages)
        count = self._allowed(memory, processed // n - first)
        if count <= 0:
            return
        known = state.ends
        self._seal(state, processed)
        m = self._limits.rows_per_page
        rows_short = (
            state.sentences_within((first + count) * n) - (len(memory.row_pages) + count) * m
        )
        extra = max(0, -(-rows_short // m))
        taken = self._take_pages(memory, count + extra)
        if taken is None or (memory.slot < 0 and not self._slots.track(state)):
            state.reason = Reason.HOST_POOL_FULL
            # A sentence that ends with a page is sealed by the token after it. Without the page
            # of that token it may have no row, and nothing tells the workers of it: its blocks
            # must not leave the device, so it is sealed when there is a page again.
            state.ends = known
            if taken is not None:
                self._pages.give(taken)
            return
        if state.reason is Reason.HOST_POOL_FULL:
            state.reason = Reason.COPYING
        self._quota = max(0, self._quota - count)
        memory.pages += taken[:count]
        memory.row_pages += taken
        state.unsent.block_ids += [b.block_id for b in blocks[first : first + count]]

    def _allowed(self, memory: Memory, backlog: int) -> int:
        """Blocks to copy now: the quota spreads bursts, but a visitor's memory depends on it."""
        return backlog if memory.visits else min(backlog, self._quota)

    def _seal(self, state: RequestState, processed: int) -> None:
        """End the groups that tokens without one have completed."""
        sealed, n = state.sealed_tokens, self._limits.block_size
        if processed <= sealed:
            return
        if state.block_groups:
            tail = np.arange(n, processed - sealed + 1, n, np.int32)
        else:  # generated tokens
            tail = self._segmentation.split_tail(state.tokens(sealed, processed), final=False)
        state.ends = np.concatenate((state.ends, tail + np.int32(sealed)))

    def _take_pages(self, memory: Memory, count: int) -> list[int] | None:
        taken = self._pages.take(max(0, count - len(memory.reserved)))
        if taken is None:
            return None
        held = memory.reserved[:count]
        del memory.reserved[:count]
        return held + taken

    def takes_pages(self, state: RequestState) -> bool:
        """A request that may be resident: it will be copied out."""
        long_enough = state.request.num_prompt_tokens >= self._limits.min_context_tokens
        wanted = state.options is not None and not state.compacts and not state.short_answer
        return wanted and long_enough

    def pages_at_admission(self, state: RequestState) -> int:
        """Host pages that a request waits for before it is admitted."""
        memory = state.memory
        if not self._limits.wait_for_pages or memory.reserved or memory.pages:
            return 0
        if not self.takes_pages(state):
            return 0
        prompt = state.request.num_prompt_tokens
        # While spaCy is at work, one page a block; the sentences' rows may take a few more.
        sentences = len(state.ends) if self.segmented(state, processed=0) else 0
        return max(prompt // self._limits.block_size, -(-sentences // self._limits.rows_per_page))

    def all_pages(self, state: RequestState) -> int:
        """Host pages that a visitor needs for its prefill; its sentences are known."""
        blocks = state.request.num_tokens // self._limits.block_size
        count, m = np.arange(1, blocks + 1), self._limits.rows_per_page
        rows = np.searchsorted(state.ends, count * self._limits.block_size, side="right")
        # Pages for sentence rows alone, in the worst of all orders of copies.
        return blocks + int(np.max(-(-rows // m) - count, initial=0))

    def fit_rows(self, state: RequestState) -> None:
        """Join short sentences of a visitor where the whole swap pool has too few rows for them:
        afterwards a page a block is enough."""
        blocks = state.request.num_tokens // self._limits.block_size
        if blocks <= self._pages.num_pages < self.all_pages(state):
            width = -(-self._limits.block_size // self._limits.rows_per_page)
            places = (state.ends - 1) // width  # one end in each stretch of a row's tokens
            state.ends = state.ends[np.append(np.diff(places) > 0, True)]
            self.coarsened += 1
