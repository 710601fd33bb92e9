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

BACKLOG_STEPS = 8  # a backlog shrinks by this share a step, whatever else is copied


class Copying:
    """Orders the copies of a step."""

    def __init__(
        self, limits: Limits, pages: PagePool, segmentation: Segmentation, slots: Slots
    ) -> None:
        self._limits, self._pages = limits, pages
        self._segmentation, self._slots = segmentation, slots
        self._quota = limits.copy_blocks_per_step

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
        n, memory = self._limits.block_size, state.memory
        first = len(memory.pages)
        backlog = processed // n - first
        # The quota spreads bursts; a share is everybody's, so that many requests do not keep
        # each other from turning sparse.
        count = min(backlog, max(self._quota, -(-backlog // BACKLOG_STEPS)))
        if count <= 0:
            return
        self._seal(state, processed)
        m = self._limits.rows_per_page
        rows_short = (
            state.sentences_within((first + count) * n) - (len(memory.row_pages) + count) * m
        )
        extra = max(0, -(-rows_short // m))
        taken = self._take_pages(memory, count + extra)
        if taken is None or (memory.slot < 0 and not self._slots.track(state)):
            state.reason = Reason.HOST_POOL_FULL
            if taken is not None:
                self._pages.give(taken)
            return
        if state.reason is Reason.HOST_POOL_FULL:
            state.reason = Reason.COPYING
        self._quota = max(0, self._quota - count)
        memory.pages += taken[:count]
        memory.row_pages += taken
        state.unsent.block_ids += [b.block_id for b in blocks[first : first + count]]

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

    def pages_at_admission(self, state: RequestState | None) -> int:
        if not self._limits.wait_for_pages or state is None or state.options is None:
            return 0
        if state.compacts:
            return 0
        prompt = state.request.num_prompt_tokens
        if prompt < self._limits.min_context_tokens or state.memory.reserved or state.memory.pages:
            return 0
        # While spaCy is at work, one page a block; the sentences' rows may take a few more.
        sentences = len(state.ends) if self.segmented(state, processed=0) else 0
        return max(prompt // self._limits.block_size, -(-sentences // self._limits.rows_per_page))
