# SPDX-License-Identifier: Apache-2.0
"""The ledger under asynchronous scheduling: what is not final is neither freed nor read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sentencekv_vllm.messages import DecodeOptions
from sentencekv_vllm.types import QueryKind

PROMPT = 101  # 25 full blocks of 4 and one token
OPTIONS = DecodeOptions(0, 0, 5.0, 0, 3, 0, 8)


class AsyncScheduler:
    """A step is scheduled while the one before it is still running, as vLLM does on a GPU."""

    def __init__(self, sim):
        self.sim, self.running, self.computed = sim, (0, 0), 0
        sim.add("a", PROMPT, options=replace(OPTIONS, query_kind=int(QueryKind.RUNNING_MEAN)))
        self.request, self.state = sim.requests["a"], sim.ledger.states["a"]
        known = self.state.tokens

        def tokens(a, b):
            assert b <= self.request.num_tokens, "a token that is not sampled yet"
            return known(a, b)

        self.state.tokens = tokens
        sim.blocks["a"] = []

    def step(self, chunk):
        """One schedule(); its message, its tokens, and the tokens whose KV is final."""
        sim, own = self.sim, self.sim.blocks["a"]
        in_flight, placeholders = self.running
        left = self.request.num_tokens + placeholders - self.computed
        count = min(chunk, left)
        processed = self.computed - in_flight
        sim.ledger.new_step()
        freed = sim.ledger.advance("a", processed, own, len(sim.free)) if own else None
        missing = sim.ledger.missing_private_blocks("a")
        if missing:
            sim.private["a"] = sim._draw(missing)
            sim.ledger.set_private_blocks("a", [b.block_id for b in sim.private["a"]])
        own += sim._draw(-(-(self.computed + count) // 4) - len(own))
        message = sim.ledger.take_message({"a": self.computed}, lambda _, j: own[j].block_id)
        self.request.num_tokens += placeholders  # the step before returns
        self.computed += count
        self.running = count, int(count == left)
        return message, count, processed, freed

    def preempt(self):
        self.sim.end("a", finished=False)
        self.running, self.computed = (0, 0), 0
        self.sim.blocks["a"] = []


@pytest.mark.parametrize("chunk", [1000, 32, 7, 1])
def test_async_scheduling_frees_and_decodes_only_what_is_final(simulate, chunk):
    engine = AsyncScheduler(simulate())
    sparse = 0
    for preempted in (False, True):
        if preempted:
            engine.preempt()
        for _ in range(PROMPT // chunk + 60):
            before = engine.computed
            message, count, processed, freed = engine.step(chunk)
            if freed is not None:
                assert freed[1] * 4 <= processed - 6, "final, and outside the recent window"
                assert processed >= PROMPT
            if message.sparse is not None:
                assert count == 1, "a sparse row decodes one token"
                assert message.sparse.seq_lens.tolist() == [before + 1]
                assert message.sparse.history_hi[0] * 4 <= processed
                sparse += 1
    assert sparse > 50
