# SPDX-License-Identifier: Apache-2.0
"""The sizes that the scheduler side decides by."""

from __future__ import annotations

from dataclasses import dataclass

from .visit_room import VisitRoom


@dataclass(frozen=True)
class Limits:
    """The sizes that the ledger's decisions depend on, in blocks unless named otherwise."""

    block_size: int  # tokens
    sink_blocks: int
    recent_tokens: int
    working_set_blocks: int
    rows_per_page: int
    min_context_tokens: int
    copy_blocks_per_step: int
    num_slots: int
    stay_dense_when_covered: bool
    wait_for_pages: bool
    min_context_tokens_with_room: int = 0  # below it, dense while there is room
    roomy_blocks: int = 0  # what must be free for that, beside what is asked for
    exact_pages: bool = True  # host pages are byte copies
    visit_room: VisitRoom | None = None  # None: a prompt must fit on the GPU as a whole
    blocks_a_step: int = 1  # most that a request's next token takes: one a KV cache group
