# SPDX-License-Identifier: Apache-2.0
"""Prompts that do not fit on the GPU: who is admitted all the same, and what leaves when.

Such a request, a visitor, holds sinks, recent window and the chunk at hand, and private blocks
into which its history comes back from the host, one layer at a time (`worker/visits.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .copying import Copying
from .limits import Limits
from .request_state import RequestState
from .turning import Turning


@dataclass(frozen=True)
class FreeBlocks:
    """vLLM's pool when a request waits to be admitted."""

    free: int
    promised: int  # of them, to visitors that have been admitted
    undrawn: int  # of them, what prompts that fit were admitted with and have not drawn yet
    usable: int  # of the whole pool


class Visiting:
    """What visitors need, hold and let go."""

    def __init__(self, limits: Limits, copying: Copying, turning: Turning) -> None:
        self._limits, self._copying, self._turning = limits, copying, turning
        self.admitted: dict[str, RequestState] = {}  # visitors that are not sparse yet
        self._residents: dict[str, RequestState] = {}  # the others that have been admitted

    def never_fits(self, state: RequestState, usable: int) -> bool:
        """The request can be served by visits only."""
        return self.whole_blocks(state) > usable and self._may_visit(state)

    def whole_blocks(self, state: RequestState) -> int:
        """GPU blocks for all of a request's tokens."""
        return -(-state.request.num_tokens // self._limits.block_size)

    def need(self, state: RequestState, found_blocks: int) -> int:
        """GPU blocks for all of the prefill.

        Args:
            found_blocks: of the prefix cache, held until they have been copied out.
        """
        room, tokens = self._limits.visit_room, state.request.num_tokens
        assert room is not None, "nobody visits"
        first_step = found_blocks + room.in_flight_blocks + room.private_blocks(tokens)
        return max(room.floor(tokens), first_step if found_blocks else 0)

    def reusable_blocks(self, state: RequestState, pool: FreeBlocks) -> int:
        """Blocks of the prefix cache that a request which never fits may take."""
        room = self._limits.visit_room
        assert room is not None, "nobody visits"
        own = room.private_blocks(state.request.num_tokens) + room.in_flight_blocks
        return max(0, pool.free - pool.promised - pool.undrawn - own)

    def gains(self, state: RequestState, needed: int, found_blocks: int) -> bool:
        """A request that fits some other time decodes sparsely anyway: it need not wait."""
        limits, room = self._limits, self._limits.visit_room
        if not self._may_visit(state) or state.short_answer:
            return False
        assert room is not None and state.options is not None
        if state.request.num_prompt_tokens < limits.min_context_tokens:
            return False
        history = room.visiting_blocks(state.request.num_prompt_tokens)
        covered = history <= state.options.budget_blocks
        if limits.stay_dense_when_covered and covered:
            return False
        return self.need(state, found_blocks) < needed and self._copying.segmented(state, 0)

    def begin(self, state: RequestState) -> None:
        """The request is given its first blocks."""
        room, memory = self._limits.visit_room, state.memory
        if room is None:
            return
        if memory.visits:
            memory.most_blocks = room.floor(state.request.num_tokens)
            memory.lost = self._limits.sink_blocks
            self.admitted[state.request_id] = state
        else:
            memory.most_blocks = self.whole_blocks(state)
            self._residents[state.request_id] = state

    def turned_sparse(self, state: RequestState) -> None:
        """What was promised to a visitor for its prefill is anybody's again."""
        self.admitted.pop(state.request_id, None)

    def end(self, state: RequestState) -> None:
        """The request gives everything back."""
        self.admitted.pop(state.request_id, None)
        self._residents.pop(state.request_id, None)

    def promised(self, but: str, held: Callable[[str], int]) -> int:
        """GPU blocks that visitors may still draw.

        Args:
            but: a request that asks itself.
            held: blocks in a request's table, nulls included, and private ones.
        """
        promised = 0
        for request_id, state in self.admitted.items():
            if request_id != but:
                gone = state.memory.lost - self._limits.sink_blocks
                promised += max(0, state.memory.most_blocks - held(request_id) + gone)
        return promised

    def undrawn(self, held: Callable[[str], int]) -> int:
        """GPU blocks that others were admitted with and have not drawn. vLLM lets a prompt begin
        whose blocks are free, and gives it those of each chunk alone."""
        return sum(max(0, s.memory.most_blocks - held(r)) for r, s in self._residents.items())

    def missing_blocks(self, state: RequestState) -> int:
        """Private blocks that an admitted visitor has not drawn yet."""
        if state.memory.staging or state.memory.sparse:
            return 0
        room = self._limits.visit_room
        assert room is not None, "nobody visits"
        return room.private_blocks(state.request.num_tokens)

    def leave(self, state: RequestState, processed: int) -> tuple[int, int] | None:
        """Blocks of a prompt that have become history and are on the host."""
        memory = state.memory
        if memory.slot < 0:
            return None
        first, end = memory.lost, self._turning.history_end(state, processed)
        if end <= first:
            return None
        memory.lost = end
        self._turning.note_released(state, end - first)
        return first, end

    def _may_visit(self, state: RequestState) -> bool:
        """Nothing but attention has to see the whole history on the device."""
        options = state.options
        return (
            self._limits.visit_room is not None
            and options is not None
            and options.settlement is None
            and not state.keeps_all
        )
