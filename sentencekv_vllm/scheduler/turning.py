# SPDX-License-Identifier: Apache-2.0
"""When a request turns sparse, and how far its history reaches."""

from __future__ import annotations

from collections.abc import Sequence

from ..messages import SettledPrompt
from .limits import Limits
from .protocols import Block
from .reasons import Reason
from .request_state import RequestState


class Turning:
    """Decides what of a request's history leaves the GPU."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.blocks_released = 0

    def history_end(self, state: RequestState, processed: int) -> int:
        """First block after the history: full, copied, indexed, outside the recent window."""
        n, memory = self._limits.block_size, state.memory
        if state.compacts:  # what follows the prompt is never dropped
            window = state.request.num_prompt_tokens - state.voting_from
            recent = max(self._limits.recent_tokens, window)
            end = (state.request.num_prompt_tokens - recent) // n
            return max(end, self._limits.sink_blocks)
        indexed = state.sentences_within(len(memory.pages) * n)
        last_end = int(state.ends[indexed - 1]) if indexed else 0
        end = min((processed - self._limits.recent_tokens) // n, last_end // n)
        if state.keeps_all:
            end = min(end, self._limits.sink_blocks + self._limits.working_set_blocks)
        return max(end, self._limits.sink_blocks)

    def working_set(self, state: RequestState, history: int) -> int:
        assert state.options is not None
        if state.compacts:  # a block is one of every layer: the largest budget is held
            return min(state.options.largest_budget, history)
        return self._limits.working_set_blocks if state.options.budget_blocks else 0

    def turn_sparse(
        self,
        state: RequestState,
        processed: int,
        blocks: Sequence[Block],
        num_free_blocks: int,
        short: bool,
    ) -> tuple[int, int] | None:
        request, memory, options = state.request, state.memory, state.options
        assert options is not None
        # A resumed request prefills its generated tokens, too: the end of the prompt is not
        # the end of the prefill.
        if processed < max(request.num_prompt_tokens, request.num_tokens - 1):
            return None
        if memory.visits:  # the history is gone already: there is nothing to weigh
            return self._turn_visitor(state, processed)
        if processed < self._limits.min_context_tokens_with_room and not short:
            state.reason = Reason.ROOM
            return None
        lo, hi = self._limits.sink_blocks, self.history_end(state, processed)
        working_set = self.working_set(state, hi - lo)
        if self._limits.stay_dense_when_covered and hi - lo <= options.budget_blocks:
            if state.reason is not Reason.HOST_POOL_FULL:
                copied = len(memory.pages) == processed // self._limits.block_size
                state.reason = Reason.BUDGET_COVERS if copied else Reason.COPYING
            return None
        if hi == lo or memory.slot < 0 or not self._can_vote(state):
            return None
        exclusive = sum(block.ref_cnt == 1 for block in blocks[lo:hi])
        if exclusive + num_free_blocks - self._limits.blocks_a_step < working_set:
            state.reason = Reason.NO_GAIN
            return None
        memory.sparse, memory.history_lo, memory.history_hi = True, lo, hi
        if state.settlement is not None:
            prompt = request.num_prompt_tokens
            prompt_blocks = [b.block_id for b in blocks[: -(-prompt // self._limits.block_size)]]
            state.unsent.settled = SettledPrompt(
                state.settlement,
                prompt_blocks,
                prompt,
                lo,
                hi,
                options.budget_blocks,
                options.layer_blocks,
            )
        self.note_released(state, exclusive)
        self._note_exactness(state, processed)
        return lo, hi

    def _turn_visitor(self, state: RequestState, processed: int) -> tuple[int, int] | None:
        memory, lo, hi = state.memory, self._limits.sink_blocks, self.history_end(state, processed)
        if hi == lo or memory.slot < 0:
            return None
        assert hi >= memory.lost, "history never shrinks"
        memory.sparse, memory.history_lo, memory.history_hi = True, lo, hi
        kept = self.working_set(state, hi - lo)
        memory.private, memory.staging = memory.staging[:kept], []
        state.unsent.private, state.unsent.staging = True, False
        self.note_released(state, hi - memory.lost)
        self._note_exactness(state, processed)
        return memory.lost, hi

    def _can_vote(self, state: RequestState) -> bool:
        """Everybody was heard, and what they vote on is indexed; true where nobody votes."""
        if state.settlement is None:
            return True
        prompt, memory = state.request.num_prompt_tokens, state.memory
        indexed = state.compacts or len(memory.pages) >= prompt // self._limits.block_size
        return indexed and memory.observed >= prompt - state.voting_from

    def extend(self, state: RequestState, processed: int) -> tuple[int, int] | None:
        memory = state.memory
        first, memory.history_hi = memory.history_hi, self.history_end(state, processed)
        assert memory.history_hi >= first, "history never shrinks"
        self._note_exactness(state, processed)
        self.note_released(state, memory.history_hi - first)
        return (first, memory.history_hi) if memory.history_hi > first else None

    def note_released(self, state: RequestState, blocks: int) -> None:
        state.blocks_released += blocks
        self.blocks_released += blocks

    def _note_exactness(self, state: RequestState, processed: int) -> None:
        memory, options = state.memory, state.options
        assert options is not None
        covered = memory.history_hi - memory.history_lo <= options.smallest_budget
        exact = covered and self._limits.exact_pages
        if memory.exact_tokens is None and not exact:
            memory.exact_tokens = processed
