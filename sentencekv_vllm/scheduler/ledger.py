# SPDX-License-Identifier: Apache-2.0
"""Who owns which host pages, and when a request turns sparse.

The ledger decides in the scheduler's step: which full blocks are copied out, when a
request's history leaves the GPU, how far it reaches. It knows no vLLM; the KV cache manager
asks it, and the connector ships what it decided (`take_message`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from ..messages import Int32s, SettledPrompt, StepMessage, StepReport
from ..types import QueryKind
from .limits import Limits
from .outbox import has_news, observed_rows, sparse_rows, take_update
from .page_pool import PagePool
from .reasons import Reason
from .request_state import Memory, RequestState, Unsent


class Block(Protocol):
    """A vLLM KV cache block."""

    block_id: int
    ref_cnt: int


class Segmentation(Protocol):
    """The part of `segmentation.service.SegmentationService` that is used here."""

    def submit(self, request_id: str, token_ids: Int32s) -> None: ...

    def poll(self, request_id: str, urgent: bool = False) -> Int32s | None: ...

    def drop(self, request_id: str) -> None: ...

    def split_tail(self, token_ids: Int32s, final: bool = False) -> Int32s: ...

    def is_boundary(self, token_id: int) -> bool: ...


class Ledger:
    """The scheduler side's books."""

    def __init__(self, limits: Limits, pages: PagePool, segmentation: Segmentation) -> None:
        self.limits = limits
        self.pages = pages
        self.segmentation = segmentation
        self.states: dict[str, RequestState] = {}
        self.finished: Counter[Reason] = Counter()
        self.blocks_released = 0
        self._slots = PagePool(limits.num_slots)
        self._slot_owner: dict[int, RequestState] = {}
        self._watched: set[str] = set()  # requests whose last prompt queries are kept
        self._dropped: list[int] = []
        self._frees = False
        self._short = self._short_next = False  # of GPU blocks: since the last step, in this one
        self._copy_quota = limits.copy_blocks_per_step
        self._step = 0

    # Lifecycle ------------------------------------------------------------------------

    def add(self, state: RequestState) -> None:
        self.states[state.request_id] = state
        if state.watched_from < state.request.num_prompt_tokens:
            self._watched.add(state.request_id)

    def release(self, request_id: str) -> None:
        """Give back everything the request holds: at finish, abort and preemption."""
        state = self.states.get(request_id)
        if state is None:
            return
        memory = state.memory
        self.pages.give(memory.row_pages + memory.reserved)
        if memory.slot >= 0:
            self._slots.give([memory.slot])
            del self._slot_owner[memory.slot]
            self._dropped.append(memory.slot)
        state.memory, state.unsent = Memory(), Unsent()
        if state.request.is_finished():
            self.forget(request_id)

    def forget(self, request_id: str) -> None:
        """The request has ended and holds nothing."""
        state = self.states.pop(request_id, None)
        if state is not None:
            assert state.memory.slot < 0, "release comes first"
            self._watched.discard(request_id)
            self.segmentation.drop(request_id)
            self.finished[state.mode] += 1

    # Decisions within one schedule() ----------------------------------------------------

    def new_step(self) -> None:
        self._copy_quota = self.limits.copy_blocks_per_step
        self._short, self._short_next = self._short_next, False

    def note_need(self, num_blocks: int, num_free_blocks: int) -> None:
        """A request, running or waiting, asks for GPU blocks."""
        self._short_next |= num_blocks + self.limits.roomy_blocks > num_free_blocks

    def advance(
        self, request_id: str, processed: int, blocks: Sequence[Block], num_free_blocks: int
    ) -> tuple[int, int] | None:
        """Copy out what is complete; turn sparse, or move the history's end.

        Args:
            processed: tokens of the request whose KV is final.
            blocks: the request's blocks, in order.
            num_free_blocks: of vLLM's pool.

        Returns:
            Range of the request's blocks to free now, or None.
        """
        state = self.states.get(request_id)
        if state is None or state.options is None or state.request.is_finished():
            return None
        # Only a prompt's tokens vote, so a short one does not turn sparse by growing.
        grown = processed if state.settlement is None else 0
        if max(state.request.num_prompt_tokens, grown) < self.limits.min_context_tokens:
            return None
        if not self._segmented(state, processed):
            state.reason = Reason.SEGMENTING
            return None
        if state.reason in (Reason.SHORT_CONTEXT, Reason.SEGMENTING):
            state.reason = Reason.COPYING
        if not state.compacts:
            self._copy_out(state, processed, blocks)
        if state.memory.sparse:
            freed = self._extend(state, processed)
        else:
            freed = self._turn_sparse(state, processed, blocks, num_free_blocks)
        self._frees |= freed is not None
        return freed

    def missing_private_blocks(self, request_id: str) -> int:
        """Blocks to draw for the working set of a request that has just turned sparse."""
        state = self.states.get(request_id)
        if state is None or not state.memory.sparse or state.memory.private:
            return 0
        return self._working_set(state, state.memory.history_hi - state.memory.history_lo)

    def set_private_blocks(self, request_id: str, block_ids: list[int]) -> None:
        state = self.states[request_id]
        state.memory.private = block_ids
        state.unsent.private = True

    def exact_tokens(self, request_id: str, num_tokens: int) -> int:
        """How many of `num_tokens` may enter the prefix cache: approximate KV never does."""
        state = self.states.get(request_id)
        if state is None or state.memory.exact_tokens is None:
            return num_tokens
        return min(num_tokens, state.memory.exact_tokens)

    def reusable_tokens(self, request_id: str, num_tokens: int) -> int:
        """How many of `num_tokens` cached ones may be taken: voting tokens are computed."""
        state = self.states.get(request_id)
        if state is None or state.settlement is None:
            return num_tokens
        return min(num_tokens, state.voting_from)

    def must_wait(self, request_id: str) -> bool:
        """At admission, with `on_pool_full: wait`: the host pages are not there yet."""
        needed = self._pages_at_admission(request_id)
        return self.pages.num_free < needed <= self.pages.num_pages

    def reserve(self, request_id: str) -> None:
        """At the first allocation: hold the prompt's pages, so that copy-out cannot fail."""
        needed = self._pages_at_admission(request_id)
        if 0 < needed <= self.pages.num_free:
            taken = self.pages.take(needed)
            assert taken is not None
            self.states[request_id].memory.reserved = taken

    # Messages ---------------------------------------------------------------------------

    def take_message(
        self,
        scheduled: Mapping[str, int],
        block_id: Callable[[str, int], int],
        num_scheduled: Mapping[str, int] | None = None,
    ) -> StepMessage:
        """Everything decided since the last message.

        Args:
            scheduled: computed tokens of each request of this step, before the step.
            block_id: id of a request's j-th block.
            num_scheduled: tokens of each that the step computes; without it nobody votes.
        """
        self._step += 1
        watched = self._observe(scheduled, num_scheduled or {})
        dropped, self._dropped = self._dropped, []
        frees, self._frees = self._frees, False
        updates = [take_update(s) for s in self._slot_owner.values() if has_news(s)]
        rows = [
            (state, computed)
            for request_id, computed in scheduled.items()
            if (state := self.states.get(request_id)) is not None and state.memory.sparse
        ]
        restarts = [self._restarts_query(state, computed) for state, computed in rows]
        for state, _ in rows:
            state.sparse_steps += 1
            state.memory.decoded_sparse = True
        sparse = sparse_rows(rows, restarts, block_id, self.limits.block_size) if rows else None
        observed = observed_rows(watched, block_id, self.limits.block_size) if watched else None
        return StepMessage(self._step, dropped, updates, sparse, frees, observed)

    def report(self, report: StepReport) -> None:
        """Book what the workers found in a step."""
        columns = (report.slots, report.hits, report.misses, report.coverage)
        for slot, hits, misses, coverage in zip(*(c.tolist() for c in columns), strict=True):
            state = self._slot_owner.get(slot)
            # A step's report may come when the slot has its next owner: under asynchronous
            # scheduling that was scheduled before the last owner's end was known.
            if state is not None and report.step > state.memory.tracked_since:
                state.hits += hits
                state.misses += misses
                if not math.isnan(coverage):
                    state.coverage_sum += coverage / report.ranks
                    state.reports += 1

    def gauges(self) -> dict[str, int]:
        """Levels for the metrics."""
        sparse = [s for s in self._slot_owner.values() if s.memory.sparse]
        return {
            "host_pages_used": self.pages.num_used,
            "host_pages_total": self.pages.num_pages,
            "sparse_requests": len(sparse),
            "resident_blocks": sum(len(s.memory.private) for s in sparse),
        }

    # Internals --------------------------------------------------------------------------

    def _observe(
        self, scheduled: Mapping[str, int], num_scheduled: Mapping[str, int]
    ) -> list[tuple[RequestState, int, int]]:
        """Requests of a step that compute tokens whose queries are kept, with the range of their
        tokens."""
        watched: list[tuple[RequestState, int, int]] = []
        if not self._watched:
            return watched
        for request_id, count in num_scheduled.items():
            if request_id not in self._watched:
                continue
            state = self.states[request_id]
            prompt, start = state.request.num_prompt_tokens, scheduled[request_id]
            first, last = max(start, state.watched_from), min(start + count, prompt)
            if first >= last or prompt < self.limits.min_context_tokens:
                continue
            if state.memory.slot >= 0 or self._track(state):
                state.memory.observed += last - first
                if state.warm_start and last == prompt:
                    state.memory.last_query = prompt - 1 - state.watched_from
                watched.append((state, start, start + count))
        return watched

    def _segmented(self, state: RequestState, processed: int) -> bool:
        if state.block_groups:
            return True
        if state.segmentation == "none":
            prompt = state.tokens(0, state.request.num_prompt_tokens)
            self.segmentation.submit(state.request_id, prompt)
            state.segmentation = "submitted"
        if state.segmentation == "submitted":
            decoding = processed >= state.request.num_prompt_tokens
            ends = self.segmentation.poll(state.request_id, urgent=decoding)
            if ends is None:
                return False
            state.ends, state.segmentation = ends, "done"
        return True

    def _copy_out(self, state: RequestState, processed: int, blocks: Sequence[Block]) -> None:
        n, memory = self.limits.block_size, state.memory
        first = len(memory.pages)
        count = min(processed // n - first, self._copy_quota)
        if count <= 0:
            return
        known = state.ends
        self._seal(state, processed)
        m = self.limits.rows_per_page
        rows_short = (
            state.sentences_within((first + count) * n) - (len(memory.row_pages) + count) * m
        )
        extra = max(0, -(-rows_short // m))
        taken = self._take_pages(memory, count + extra)
        if taken is None or (memory.slot < 0 and not self._track(state)):
            state.reason = Reason.HOST_POOL_FULL
            # A sentence that ends with a page is sealed by the token after it. Without the page
            # of that token it may have no row, and nothing tells the workers of it: its blocks
            # must not leave the device, so it is sealed when there is a page again.
            state.ends = known
            if taken is not None:
                self.pages.give(taken)
            return
        if state.reason is Reason.HOST_POOL_FULL:
            state.reason = Reason.COPYING
        self._copy_quota -= count
        memory.pages += taken[:count]
        memory.row_pages += taken
        state.unsent.block_ids += [b.block_id for b in blocks[first : first + count]]

    def _seal(self, state: RequestState, processed: int) -> None:
        """End the groups that tokens without one have completed."""
        sealed, n = state.sealed_tokens, self.limits.block_size
        if processed <= sealed:
            return
        if state.block_groups:
            tail = np.arange(n, processed - sealed + 1, n, np.int32)
        else:  # generated tokens
            tail = self.segmentation.split_tail(state.tokens(sealed, processed), final=False)
        state.ends = np.concatenate((state.ends, tail + np.int32(sealed)))

    def _take_pages(self, memory: Memory, count: int) -> list[int] | None:
        taken = self.pages.take(max(0, count - len(memory.reserved)))
        if taken is None:
            return None
        held = memory.reserved[:count]
        del memory.reserved[:count]
        return held + taken

    def _track(self, state: RequestState) -> bool:
        slot = self._slots.take(1)
        if slot is None:
            return False
        state.memory.slot, state.memory.tracked_since = slot[0], self._step
        self._slot_owner[slot[0]] = state
        return True

    def _history_end(self, state: RequestState, processed: int) -> int:
        """First block after the history: full, copied, indexed, outside the recent window."""
        n, memory = self.limits.block_size, state.memory
        if state.compacts:  # what follows the prompt is never dropped
            window = state.request.num_prompt_tokens - state.voting_from
            recent = max(self.limits.recent_tokens, window)
            end = (state.request.num_prompt_tokens - recent) // n
            return max(end, self.limits.sink_blocks)
        indexed = state.sentences_within(len(memory.pages) * n)
        last_end = int(state.ends[indexed - 1]) if indexed else 0
        end = min((processed - self.limits.recent_tokens) // n, last_end // n)
        if state.keeps_all:
            end = min(end, self.limits.sink_blocks + self.limits.working_set_blocks)
        return max(end, self.limits.sink_blocks)

    def _working_set(self, state: RequestState, history: int) -> int:
        assert state.options is not None
        if state.compacts:  # a block is one of every layer: the largest budget is held
            return min(state.options.largest_budget, history)
        return self.limits.working_set_blocks if state.options.budget_blocks else 0

    def _turn_sparse(
        self, state: RequestState, processed: int, blocks: Sequence[Block], num_free_blocks: int
    ) -> tuple[int, int] | None:
        request, memory, options = state.request, state.memory, state.options
        assert options is not None
        # A resumed request prefills its generated tokens, too: the end of the prompt is not
        # the end of the prefill.
        if processed < max(request.num_prompt_tokens, request.num_tokens - 1):
            return None
        if processed < self.limits.min_context_tokens_with_room and not self._short:
            state.reason = Reason.ROOM
            return None
        lo, hi = self.limits.sink_blocks, self._history_end(state, processed)
        working_set = self._working_set(state, hi - lo)
        if self.limits.stay_dense_when_covered and hi - lo <= options.budget_blocks:
            if state.reason is not Reason.HOST_POOL_FULL:
                copied = len(memory.pages) == processed // self.limits.block_size
                state.reason = Reason.BUDGET_COVERS if copied else Reason.COPYING
            return None
        if hi == lo or memory.slot < 0 or not self._can_vote(state):
            return None
        exclusive = sum(block.ref_cnt == 1 for block in blocks[lo:hi])
        if exclusive + num_free_blocks - 1 < working_set:
            state.reason = Reason.NO_GAIN
            return None
        memory.sparse, memory.history_lo, memory.history_hi = True, lo, hi
        if state.settlement is not None:
            prompt = request.num_prompt_tokens
            prompt_blocks = [b.block_id for b in blocks[: -(-prompt // self.limits.block_size)]]
            state.unsent.settled = SettledPrompt(
                state.settlement,
                prompt_blocks,
                prompt,
                lo,
                hi,
                options.budget_blocks,
                options.layer_blocks,
            )
        self._note_released(state, exclusive)
        self._note_exactness(state, processed)
        return lo, hi

    def _can_vote(self, state: RequestState) -> bool:
        """Everybody was heard, and what they vote on is indexed; true where nobody votes."""
        if state.settlement is None:
            return True
        prompt, memory = state.request.num_prompt_tokens, state.memory
        indexed = state.compacts or len(memory.pages) >= prompt // self.limits.block_size
        return indexed and memory.observed >= prompt - state.voting_from

    def _extend(self, state: RequestState, processed: int) -> tuple[int, int] | None:
        memory = state.memory
        first, memory.history_hi = memory.history_hi, self._history_end(state, processed)
        assert memory.history_hi >= first, "history never shrinks"
        self._note_exactness(state, processed)
        self._note_released(state, memory.history_hi - first)
        return (first, memory.history_hi) if memory.history_hi > first else None

    def _note_released(self, state: RequestState, blocks: int) -> None:
        state.blocks_released += blocks
        self.blocks_released += blocks

    def _note_exactness(self, state: RequestState, processed: int) -> None:
        memory, options = state.memory, state.options
        assert options is not None
        covered = memory.history_hi - memory.history_lo <= options.smallest_budget
        exact = covered and self.limits.exact_pages
        if memory.exact_tokens is None and not exact:
            memory.exact_tokens = processed

    def _pages_at_admission(self, request_id: str) -> int:
        state = self.states.get(request_id)
        if not self.limits.wait_for_pages or state is None or state.options is None:
            return 0
        if state.compacts:
            return 0
        prompt = state.request.num_prompt_tokens
        if prompt < self.limits.min_context_tokens or state.memory.reserved or state.memory.pages:
            return 0
        # While spaCy is at work, one page a block; the sentences' rows may take a few more.
        sentences = len(state.ends) if self._segmented(state, processed=0) else 0
        return max(prompt // self.limits.block_size, -(-sentences // self.limits.rows_per_page))

    def _restarts_query(self, state: RequestState, computed: int) -> bool:
        """Whether the step ranks by its own query alone (where it would look back at all)."""
        assert state.options is not None
        if not state.memory.decoded_sparse:
            return True
        if state.options.query_kind != QueryKind.RUNNING_MEAN:
            return False
        if state.block_groups:
            return computed % self.limits.block_size == 0
        return self.segmentation.is_boundary(int(state.tokens(computed - 1, computed)[0]))
