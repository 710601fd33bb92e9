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

from ..messages import StepMessage, StepReport, VisitRows
from ..types import QueryKind
from .admission import Admission
from .copying import Copying
from .limits import Limits
from .outbox import has_news, observed_rows, sparse_rows, take_update, visit_rows
from .page_pool import PagePool
from .protocols import Block, Segmentation
from .reasons import Reason
from .request_state import Memory, RequestState, Unsent
from .slots import Slots
from .turning import Turning
from .visiting import FreeBlocks, Visiting


class Ledger:
    """The scheduler side's books."""

    def __init__(self, limits: Limits, pages: PagePool, segmentation: Segmentation) -> None:
        self.limits = limits
        self.pages = pages
        self.segmentation = segmentation
        self.states: dict[str, RequestState] = {}
        self.finished: Counter[Reason] = Counter()
        self.slots = Slots(limits.num_slots)
        self._copying = Copying(limits, pages, segmentation, self.slots)
        self._turning = Turning(limits)
        self._visiting = Visiting(limits, self._copying, self._turning)
        self.admission = Admission(limits, pages, self._copying, self._visiting)
        self._watched: set[str] = set()  # requests whose last prompt queries are kept
        self._frees = False
        self._short = self._short_next = False  # of GPU blocks: since the last step, in this one
        self._step = 0

    @property
    def blocks_released(self) -> int:
        return self._turning.blocks_released

    @property
    def joined_sentences(self) -> int:
        return self._copying.coarsened

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
        self.slots.drop(state)
        self.admission.end(state)
        state.memory, state.unsent = Memory(), Unsent()
        if state.request.is_finished():
            self.forget(request_id)

    def forget(self, request_id: str) -> None:
        """The request has ended and holds nothing."""
        state = self.states.pop(request_id, None)
        if state is not None:
            assert state.memory.slot < 0, "release comes first"
            self._watched.discard(request_id)
            self.admission.end(state)
            self.segmentation.drop(request_id)
            self.finished[state.mode] += 1

    # Decisions within one schedule() ----------------------------------------------------

    def new_step(self) -> None:
        self._copying.new_step()
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
        visits = state.memory.visits
        if not visits and not self._may_turn_sparse(state, processed):
            return None
        if not self._copying.segmented(state, processed):
            state.reason = Reason.SEGMENTING
            return None
        if state.reason in (Reason.SHORT_CONTEXT, Reason.SEGMENTING):
            state.reason = Reason.COPYING
        if not state.compacts:
            self._copying.copy_out(state, processed, blocks)
        if state.memory.sparse:
            freed = self._turning.extend(state, processed)
        else:
            freed = self._turning.turn_sparse(
                state, processed, blocks, num_free_blocks, self._short
            )
            if visits and not state.memory.sparse:
                freed = self._visiting.leave(state, processed)
        if state.memory.sparse:
            self._visiting.turned_sparse(state)
        self._frees |= freed is not None
        return freed

    def missing_private_blocks(self, request_id: str) -> int:
        """Blocks to draw: the staging of a visitor that has been admitted, the working set of a
        request that has just turned sparse."""
        state = self.states.get(request_id)
        if state is None or state.memory.private:
            return 0
        if state.memory.visits:
            return self._visiting.missing_blocks(state)
        if not state.memory.sparse:
            return 0
        return self._turning.working_set(state, state.memory.history_hi - state.memory.history_lo)

    def set_private_blocks(self, request_id: str, block_ids: list[int]) -> None:
        state = self.states[request_id]
        if state.memory.visits:
            state.memory.staging, state.unsent.staging = block_ids, True
        else:
            state.memory.private, state.unsent.private = block_ids, True

    def private_blocks(self, request_id: str) -> int:
        """Private blocks that a request has a use for."""
        state = self.states.get(request_id)
        return 0 if state is None else len(state.memory.staging or state.memory.private)

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

    def reusable_blocks(self, request_id: str, found_blocks: int, pool: FreeBlocks) -> int:
        """How many blocks of the prefix cache may be taken: they must fit beside a visitor's."""
        state = self.states.get(request_id)
        if state is None or not self._visiting.never_fits(state, pool.usable):
            return found_blocks
        return min(found_blocks, self._visiting.reusable_blocks(state, pool))

    # Admission --------------------------------------------------------------------------

    def free_blocks(
        self, request_id: str, free: int, usable: int, held: Callable[[str], int]
    ) -> FreeBlocks:
        """vLLM's pool as a waiting request sees it.

        Args:
            free, usable: blocks that are free, and all of them.
            held: blocks in a request's table, nulls included, and private ones.
        """
        promised = self._visiting.promised(request_id, held)
        return FreeBlocks(free, promised, self._visiting.undrawn(held), usable)

    def promised_to_others(self, request_id: str, held: Callable[[str], int]) -> int:
        """GPU blocks that a running request leaves to visitors; these have a promise themselves,
        and all promises can be kept."""
        if request_id in self._visiting.admitted:
            return 0
        return self._visiting.promised(request_id, held)

    def blocks_at_admission(
        self, request_id: str, needed: int, found_blocks: int, pool: FreeBlocks
    ) -> int | None:
        """See `Admission.blocks`."""
        state = self.states.get(request_id)
        if state is None:
            return needed + pool.promised
        return self.admission.blocks(state, needed, found_blocks, pool)

    def steps_aside(self, request_id: str, usable: int) -> bool:
        """See `Admission.steps_aside`."""
        state = self.states.get(request_id)
        return state is not None and self.admission.steps_aside(state, usable)

    def reserve(self, request_id: str) -> None:
        """See `Admission.reserve`."""
        state = self.states.get(request_id)
        if state is not None:
            self.admission.reserve(state)

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
        self.slots.step = self._step
        watched = self._observe(scheduled, num_scheduled or {})
        dropped = self.slots.take_dropped()
        frees, self._frees = self._frees, False
        updates = [take_update(s) for s in self.slots.owners.values() if has_news(s)]
        rows = [
            (state, computed)
            for request_id, computed in scheduled.items()
            if (state := self.states.get(request_id)) is not None and state.memory.sparse
        ]
        restarts = [self._restarts_query(state, computed) for state, computed in rows]
        for state, _ in rows:
            state.sparse_steps += 1
            state.memory.decoded_sparse = True
        visits = self._visit_rows(scheduled, num_scheduled or {}, block_id)
        sparse = sparse_rows(rows, restarts, block_id, self.limits.block_size) if rows else None
        observed = observed_rows(watched, block_id, self.limits.block_size) if watched else None
        return StepMessage(self._step, dropped, updates, sparse, frees, observed, visits)

    def report(self, report: StepReport) -> None:
        """Book what the workers found in a step."""
        columns = (report.slots, report.hits, report.misses, report.coverage)
        for slot, hits, misses, coverage in zip(*(c.tolist() for c in columns), strict=True):
            state = self.slots.owners.get(slot)
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
        sparse = [s for s in self.slots.owners.values() if s.memory.sparse]
        return {
            "host_pages_used": self.pages.num_used,
            "host_pages_total": self.pages.num_pages,
            "sparse_requests": len(sparse),
            "resident_blocks": sum(len(s.memory.private) for s in sparse),
        }

    # Internals --------------------------------------------------------------------------

    def _may_turn_sparse(self, state: RequestState, processed: int) -> bool:
        if state.short_answer:
            return False
        # Only a prompt's tokens vote, so a short one does not turn sparse by growing.
        grown = processed if state.settlement is None else 0
        return max(state.request.num_prompt_tokens, grown) >= self.limits.min_context_tokens

    def _visit_rows(
        self,
        scheduled: Mapping[str, int],
        num_scheduled: Mapping[str, int],
        block_id: Callable[[str, int], int],
    ) -> VisitRows | None:
        rows = [
            (state, scheduled[request_id] + num_scheduled[request_id])
            for request_id, state in self._visiting.admitted.items()
            if request_id in num_scheduled and state.memory.lost > self.limits.sink_blocks
        ]
        if not rows:
            return None
        return visit_rows(rows, block_id, self.limits.block_size, self.limits.sink_blocks)

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
            if first >= last or not self._may_turn_sparse(state, 0):
                continue
            if state.memory.slot >= 0 or self.slots.track(state):
                state.memory.observed += last - first
                if state.warm_start and last == prompt:
                    state.memory.last_query = prompt - 1 - state.watched_from
                watched.append((state, start, start + count))
        return watched

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
