# SPDX-License-Identifier: Apache-2.0
"""Requests whose last prompt tokens vote: who is observed, when, and what is freed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sentencekv_vllm.messages import DecodeOptions
from sentencekv_vllm.scheduler.reasons import Reason
from sentencekv_vllm.types import Fate, Settlement

PROMPT, WINDOW = 101, 9  # 25 full blocks of 4 and one token; recent window of 6
VOTING = DecodeOptions(
    0, 0, 0.0, 0, 3, 0, 8, block_groups=True, settlement=Settlement(Fate.COMPACT, window=WINDOW)
)
POOL = replace(VOTING, block_groups=False, settlement=Settlement(Fate.RETAIN, window=WINDOW))

PLAIN = replace(VOTING, settlement=None)


def observed_places(messages) -> list[int]:
    """Places in the window whose queries the workers are told to keep, in order."""
    rows = [m.observed for m in messages if m.observed is not None]
    return [int(r.places[0]) + i for r in rows for i in range(int(r.counts[0]))]


@pytest.mark.parametrize("chunk", [1000, 32, 13, 4, 1])
def test_each_voting_token_is_observed_once_whatever_the_chunks(simulate, chunk):
    sim = simulate()
    sim.add("a", PROMPT, options=VOTING)
    messages, first = [], 0
    while sim.left("a") > 0:
        message = sim.step("a", min(chunk, sim.left("a")))
        last = sim.computed["a"]
        if message.observed is not None:
            rows = message.observed
            voting = range(max(first, PROMPT - WINDOW), last)
            assert int(rows.counts[0]) == len(voting)
            assert int(rows.offsets[0]) == last - 1 - voting[0], "from the row's last token"
            assert rows.tail_blocks[0] == sim.blocks["a"][(last - 1) // 4].block_id
            assert rows.slots[0] >= 0
        messages.append(message)
        first = last
        if last == PROMPT:
            break
    assert observed_places(messages) == list(range(WINDOW))


def test_a_compacted_history_is_freed_once_and_nothing_is_copied_out(simulate):
    sim = simulate()
    sim.add("a", PROMPT, options=VOTING)
    sim.prefill("a", 32)
    before, blocks = len(sim.free), [b.block_id for b in sim.blocks["a"]]
    message = sim.step("a", 1)
    (update,) = message.updates
    lo, hi = 1, (PROMPT - WINDOW) // 4
    assert (update.settled.history_lo, update.settled.history_hi) == (lo, hi)
    assert update.settled.block_ids == blocks and update.settled.num_tokens == PROMPT
    assert len(update.private_blocks) == VOTING.budget_blocks
    assert not update.block_ids and not update.page_ids and sim.ledger.pages.num_used == 0
    assert len(sim.free) - before == hi - lo - VOTING.budget_blocks
    for _ in range(40):
        message = sim.step("a", 1)
        assert not message.updates
        assert (message.sparse.history_lo[0], message.sparse.history_hi[0]) == (lo, hi)
    assert sim.ledger.states["a"].summary()["mode"] == "sparse"
    sim.end("a")
    assert sim.is_clean


def test_a_pool_keeps_its_pages_and_its_sentences(simulate):
    sim = simulate()
    sim.add("a", PROMPT, options=POOL)
    sim.prefill("a", 32)
    message = sim.step("a", 1)
    (update,) = message.updates
    assert update.settled is not None and len(update.private_blocks) == 5, "the working set"
    assert sim.ledger.pages.num_used == PROMPT // 4
    first = int(message.sparse.history_hi[0])
    for _ in range(20):
        message = sim.step("a", 1)
        assert all(u.settled is None for u in message.updates)
    assert int(message.sparse.history_hi[0]) > first, "generated text can be recalled"
    sim.end("a")
    assert sim.is_clean


@pytest.mark.parametrize("options", [VOTING, POOL])
def test_a_preempted_request_votes_again(simulate, options):
    sim = simulate()
    sim.add("a", PROMPT, options=options)
    sim.prefill("a", 32)
    for _ in range(5):
        sim.step("a", 1)
    sim.end("a", finished=False)
    messages = sim.prefill("a", 32)
    assert observed_places(messages) == list(range(WINDOW)), "of the prompt, not what followed"
    (update,) = sim.step("a", 1).updates
    assert update.settled.num_tokens == PROMPT
    if options.compacts:
        assert update.settled.history_hi == (PROMPT - WINDOW) // 4
    sim.end("a")
    assert sim.is_clean


def test_who_was_not_heard_stays_dense(simulate):
    sim = simulate()
    sim.add("a", PROMPT, options=VOTING)
    sim.prefill("a", 32)
    sim.ledger.states["a"].memory.observed -= 1
    assert sim.step("a", 1).sparse is None
    assert sim.ledger.states["a"].mode is Reason.COPYING


def test_a_short_prompt_does_not_turn_sparse_by_growing(simulate):
    sim = simulate()
    sim.add("a", 15, options=VOTING)  # min_context_tokens is 20
    messages = sim.prefill("a")
    for _ in range(60):
        messages.append(sim.step("a", 1))
    assert not any(m.sparse or m.observed for m in messages)
    assert sim.ledger.states["a"].mode is Reason.SHORT_CONTEXT


def test_cached_tokens_are_reused_up_to_the_first_voting_one(simulate):
    sim = simulate()
    sim.add("a", PROMPT, options=VOTING)
    sim.add("b", PROMPT)
    assert sim.ledger.reusable_tokens("a", 100) == PROMPT - WINDOW
    assert sim.ledger.reusable_tokens("a", 16) == 16
    assert sim.ledger.reusable_tokens("b", 100) == 100
    assert sim.ledger.reusable_tokens("unknown", 100) == 100


def test_compaction_waits_for_no_host_page(simulate):
    sim = simulate(num_pages=1, wait_for_pages=True)
    sim.add("a", PROMPT, options=VOTING)
    assert not sim.waits("a")
    sim.prefill("a", 32)
    assert sim.step("a", 1).sparse is not None
    assert np.all(sim.step("a", 1).sparse.seq_lens == PROMPT + 2)


def test_a_compacted_request_holds_its_largest_layers_blocks_and_no_more_than_its_history(simulate):
    lo, hi = 1, (PROMPT - WINDOW) // 4
    for by_layer, held in (((5, 4, 2, 1), 5), ((40, 1, 1, 1), hi - lo)):
        sim = simulate()
        sim.add("a", PROMPT, options=replace(VOTING, layer_blocks=by_layer))
        sim.prefill("a", 32)
        (update,) = sim.step("a", 1).updates
        assert len(update.private_blocks) == held
        assert [update.settled.budget(layer) for layer in range(4)] == list(by_layer)
        sim.end("a")
        assert sim.is_clean


def test_kv_is_exact_only_where_the_smallest_budget_covers_the_history(simulate):
    for by_layer, exact in (((), True), ((50, 10), False)):
        sim = simulate(stay_dense_when_covered=False)
        options = DecodeOptions(0, 0, 0.0, 0, 30, 0, 8, layer_blocks=by_layer)
        sim.add("a", PROMPT, options=options)
        sim.prefill("a", 32)
        for _ in range(3):
            sim.step("a", 1)
        assert sim.ledger.states["a"].memory.sparse
        assert (sim.ledger.exact_tokens("a", PROMPT + 3) == PROMPT + 3) == exact


@pytest.mark.parametrize("chunk", [1000, 25, 1])
@pytest.mark.parametrize(("options", "window"), [(PLAIN, 1), (POOL, WINDOW)])
def test_the_prompts_last_query_is_named_when_the_working_set_is_drawn(
    simulate, chunk, options, window
):
    sim = simulate()
    sim.add("a", PROMPT, options=options, warm_start=True)
    messages = []
    while sim.computed.get("a", 0) < PROMPT:
        messages.append(sim.step("a", min(chunk, PROMPT - sim.computed.get("a", 0))))
    assert observed_places(messages) == list(range(window))
    assert all(u.last_query == -1 for m in messages for u in m.updates)
    (update,) = sim.step("a", 1).updates
    assert update.private_blocks and update.last_query == window - 1


def test_without_warm_start_nobody_is_told_of_a_query(simulate):
    sim = simulate()
    sim.add("a", PROMPT)
    first = sim.step("a", PROMPT)
    (update,) = sim.step("a", 1).updates
    assert first.observed is None and update.private_blocks and update.last_query == -1
