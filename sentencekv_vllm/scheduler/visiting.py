# SPDX-License-Identifier: Apache-2.0
"""Prompts that do not fit on the GPU: who is admitted all the same, and what leaves when.

Such a request, a visitor, holds sinks, recent window and the chunk at hand, and private blocks
into which its history comes back from the host, one layer at a time (`worker/visits.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from .copying import Copying
from .limits import Limits
from .request_state import RequestState
from .turning import Turning


@dataclass(frozen=True)
class FreeBlocks:
    """vLLM's pool at an admission."""

    free: int  # not promised to visitors that have been admitted
    usable: int  # of the whole pool


class Visiting:
    """Decides at admission, and after each chunk."""

    def __init__(self, limits: Limits, copying: Copying, turning: Turning) -> None:
        self._limits, self._copying, self._turning = limits, copying, turning
        self.admitted: dict[str, RequestState] = {}  # and not sparse yet

    def never_fits(self, state: RequestState, usable: int) -> bool:
        """The request can be served by visits only."""
        blocks = -(-state.request.num_tokens // self._limits.block_size)
        return blocks > usable and self._may_visit(state)

    def need(self, state: RequestState, found_blocks: int) -> int:
        """GPU blocks for all of the prefill.

        Args:
            found_blocks: of the prefix cache, held until they have been copied out.
        """
        room, tokens = self._limits.visit_room, state.request.num_tokens
        assert room is not None, "nobody visits"
        first_step = found_blocks + room.in_flight_blocks + room.private_blocks(tokens)
        return max(room.floor(tokens), first_step if found_blocks else 0)

    def reusable_blocks(self, state: RequestState, free: FreeBlocks) -> int:
        """Blocks of the prefix cache that a request which never fits may take."""
        room = self._limits.visit_room
        assert room is not None, "nobody visits"
        own = room.private_blocks(state.request.num_tokens) + room.in_flight_blocks
        return max(0, free.free - own)

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

    def admit(self, state: RequestState) -> None:
        """The request has been given its first blocks."""
        self.admitted[state.request_id] = state
        room = self._limits.visit_room
        assert room is not None, "nobody visits"
        state.memory.floor = room.floor(state.request.num_tokens)
        state.memory.lost = self._limits.sink_blocks

    def end(self, state: RequestState) -> None:
        """The request has turned sparse, or gives everything back."""
        self.admitted.pop(state.request_id, None)

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
