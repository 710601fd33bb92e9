# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler as far as the ledger sees it: requests, blocks, chunks of a prompt."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from sentencekv_vllm.messages import DecodeOptions, StepMessage
from sentencekv_vllm.scheduler.ledger import Ledger
from sentencekv_vllm.scheduler.limits import Limits
from sentencekv_vllm.scheduler.page_pool import PagePool
from sentencekv_vllm.scheduler.request_state import RequestState

BLOCK = 4
BOUNDARY = 7  # every seventh token ends a sentence


@dataclass
class Block:
    block_id: int
    ref_cnt: int = 0


@dataclass
class Request:
    num_prompt_tokens: int
    num_tokens: int
    finished: bool = False

    def is_finished(self) -> bool:
        return self.finished


class Segmentation:
    """Sentences of seven tokens; `late` prompts have no answer yet."""

    def __init__(self) -> None:
        self.known: dict[str, np.ndarray] = {}
        self.late = False

    def submit(self, request_id, token_ids):
        assert request_id not in self.known
        n = len(token_ids)
        ends = [*range(BOUNDARY, n, BOUNDARY), n]
        self.known[request_id] = np.asarray(ends, np.int32)

    def poll(self, request_id, urgent=False):
        return None if self.late else self.known[request_id]

    def drop(self, request_id):
        self.known.pop(request_id, None)

    def split_tail(self, token_ids, final=False):
        return np.arange(BOUNDARY, len(token_ids), BOUNDARY, dtype=np.int32)

    def is_boundary(self, token_id):
        return token_id % BOUNDARY == 0


OPTIONS = DecodeOptions(
    index_kind=0, reduce=0, retention=5.0, query_kind=0, budget_blocks=3, seed=0
)
LIMITS = Limits(
    block_size=BLOCK,
    sink_blocks=1,
    recent_tokens=6,
    working_set_blocks=5,
    rows_per_page=1,
    min_context_tokens=20,
    copy_blocks_per_step=1000,
    num_slots=8,
    stay_dense_when_covered=True,
    wait_for_pages=False,
)


@dataclass
class Simulation:
    """A scheduler of one request at a time, over one pool of blocks."""

    ledger: Ledger
    free: list[Block]
    num_blocks: int
    requests: dict[str, Request] = field(default_factory=dict)
    blocks: dict[str, list[Block]] = field(default_factory=dict)
    private: dict[str, list[Block]] = field(default_factory=dict)
    computed: dict[str, int] = field(default_factory=dict)
    asynchronous: bool = False  # a step is scheduled before the one before it has returned
    in_flight: dict[str, int] = field(default_factory=dict)
    placeholders: dict[str, int] = field(default_factory=dict)  # tokens being sampled

    def add(self, request_id: str, prompt: int, options=OPTIONS, **state) -> None:
        request = Request(prompt, prompt)
        self.requests[request_id] = request
        self.ledger.add(
            RequestState(
                request_id=request_id,
                request=request,
                tokens=lambda a, b: np.arange(a, b, dtype=np.int32),
                options=options,
                **state,
            )
        )

    def step(self, request_id: str, tokens: int) -> StepMessage | None:
        """Schedule some tokens as `allocate_slots` does; None: no room, nothing scheduled."""
        ledger, request = self.ledger, self.requests[request_id]
        processed = self.computed.get(request_id, 0)
        own = self.blocks.setdefault(request_id, [])
        ledger.new_step()
        if not own and not self.is_admitted(request_id):
            return None
        if own:
            final = processed - self.in_flight.get(request_id, 0)
            freed = ledger.advance(request_id, final, own, len(self.free))
            for j in range(*freed) if freed else ():
                own[j].ref_cnt -= 1
                if own[j].ref_cnt == 0:
                    self.free.append(own[j])
                own[j] = Block(0)
            kept = ledger.private_blocks(request_id)
            self._give(self.private.get(request_id, [])[kept:])
            del self.private.get(request_id, [])[kept:]
        missing = ledger.missing_private_blocks(request_id)
        needed = -(-(processed + tokens) // BLOCK) - len(own)
        wanted = missing + needed + ledger.promised_to_others(request_id, self.rows)
        ledger.note_need(wanted, len(self.free))
        if wanted > len(self.free):
            return None
        if not own:
            ledger.reserve(request_id)
        if missing:
            self.private[request_id] = self._draw(missing)
            ledger.set_private_blocks(request_id, [b.block_id for b in self.private[request_id]])
        own += self._draw(needed)
        message = ledger.take_message(
            {request_id: processed},
            lambda name, j: self.blocks[name][j].block_id,
            {request_id: tokens},
        )
        self.computed[request_id] = processed + tokens
        request.num_tokens += self.placeholders.pop(request_id, 0)  # the step before returns
        sampled = int(self.computed[request_id] == request.num_tokens)
        if self.asynchronous:
            self.in_flight[request_id], self.placeholders[request_id] = tokens, sampled
        else:
            request.num_tokens += sampled
        return message

    def is_admitted(self, request_id: str) -> bool:
        """What `allocate_slots` asks before a request's first blocks."""
        ledger, free = self.ledger, len(self.free)
        pool = ledger.free_blocks(request_id, free, self.num_blocks, self.rows)
        needed = -(-self.requests[request_id].num_tokens // BLOCK)
        wanted = ledger.blocks_at_admission(request_id, needed, 0, pool)
        ledger.note_need(self.num_blocks if wanted is None else wanted, free)
        return wanted is not None and wanted <= free

    def waits(self, request_id: str) -> bool:
        """For host pages."""
        return self.ledger.admission.waits(self.ledger.states[request_id], self.num_blocks)

    def rows(self, request_id: str) -> int:
        """Blocks in a request's table, nulls included, and private ones."""
        return len(self.blocks.get(request_id, ())) + len(self.private.get(request_id, ()))

    def held(self, request_id: str) -> int:
        """GPU blocks of a request."""
        own = [b for b in self.blocks.get(request_id, ()) if b.block_id]
        return len(own) + len(self.private.get(request_id, ()))

    def prefill(self, request_id: str, chunk: int = 1000) -> list[StepMessage]:
        """Schedule the prompt in chunks, and the generated tokens of a resumed request."""
        messages = []
        while (left := self.left(request_id)) > 0:
            message = self.step(request_id, min(chunk, left))
            assert message is not None, "the pool of the test is too small"
            messages.append(message)
            if left <= chunk:
                break
        return messages

    def left(self, request_id: str) -> int:
        known = self.requests[request_id].num_tokens + self.placeholders.get(request_id, 0)
        return known - self.computed.get(request_id, 0)

    def end(self, request_id: str, finished: bool = True) -> None:
        """Finish or preempt."""
        self.requests[request_id].finished = finished
        self._give(self.blocks.pop(request_id, []) + self.private.pop(request_id, []))
        self.ledger.release(request_id)
        self.computed.pop(request_id, None)
        self.in_flight.pop(request_id, None)
        self.placeholders.pop(request_id, None)
        if finished:
            self.ledger.forget(request_id)
            del self.requests[request_id]

    def _give(self, blocks: list[Block]) -> None:
        for block in blocks:
            if block.block_id:
                block.ref_cnt -= 1
                if block.ref_cnt == 0:
                    self.free.append(block)

    def _draw(self, count: int) -> list[Block]:
        drawn = [self.free.pop(0) for _ in range(count)]
        for block in drawn:
            block.ref_cnt = 1
        return drawn

    @property
    def is_clean(self) -> bool:
        return (
            len(self.free) == self.num_blocks
            and self.ledger.pages.num_used == 0
            and not self.ledger.states
            and not self.ledger.gauges()["sparse_requests"]
            and not self.ledger.segmentation.known
        )


def start(
    num_blocks: int = 200, num_pages: int = 200, asynchronous: bool = False, **limits
) -> Simulation:
    ledger = Ledger(replace(LIMITS, **limits), PagePool(num_pages), Segmentation())
    return Simulation(
        ledger, [Block(i) for i in range(1, num_blocks + 1)], num_blocks, asynchronous=asynchronous
    )


@pytest.fixture(scope="session")
def simulate():
    """Start a simulation; limits by name."""
    return start
