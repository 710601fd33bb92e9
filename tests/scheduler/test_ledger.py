# SPDX-License-Identifier: Apache-2.0
"""When a request turns sparse, what it frees, and what it gives back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sentencekv_vllm.messages import DecodeOptions, StepReport
from sentencekv_vllm.scheduler.reasons import Reason
from sentencekv_vllm.scheduler.visit_room import VisitRoom
from sentencekv_vllm.types import QueryKind

PROMPT = 101  # 25 full blocks of 4 and one token
OPTIONS = DecodeOptions(0, 0, 5.0, 0, 3, 0, 8)
BLOCK_GROUPS = replace(OPTIONS, block_groups=True)


def merged(messages, name):
    """One list of all updates' items."""
    return [item for m in messages for u in m.updates for item in getattr(u, name)]


@pytest.mark.parametrize("chunk", [1000, 32, 13, 4])
def test_every_complete_block_is_copied_once_in_order_whatever_the_chunks(simulate, chunk):
    sim = simulate()
    sim.add("a", PROMPT)
    messages = sim.prefill("a", chunk)
    in_prefill = [b.block_id for b in sim.blocks["a"]]
    messages.append(sim.step("a", 1))
    assert merged(messages, "block_ids") == in_prefill[: PROMPT // 4]
    pages = merged(messages, "page_ids")
    assert len(set(pages)) == len(pages) == PROMPT // 4
    assert set(pages) <= set(merged(messages, "row_pages"))
    ends = merged(messages, "sentence_ends")
    assert ends == sorted(set(ends)) and ends[-1] == PROMPT
    options = [u.options for m in messages for u in m.updates]
    assert options[0] is not None and not any(options[1:]), "told once"


def test_the_first_decode_step_frees_the_history_and_draws_the_working_set(simulate):
    sim = simulate()
    sim.add("a", PROMPT)
    sim.prefill("a")
    before = len(sim.free)
    message = sim.step("a", 1)
    rows = message.sparse
    lo, hi = int(rows.history_lo[0]), int(rows.history_hi[0])
    assert (lo, hi) == (1, (PROMPT - 6) // 4), "sinks before it, the recent window after it"
    assert len(sim.free) - before == hi - lo - 5, "freed, less the working set"
    assert message.updates[0].private_blocks == [b.block_id for b in sim.private["a"]]
    assert rows.tail_blocks[0] == sim.blocks["a"][-1].block_id


def test_resident_blocks_stay_bounded_while_the_history_grows(simulate):
    sim = simulate()
    sim.add("a", PROMPT)
    sim.prefill("a")
    his = []
    for _ in range(80):
        message = sim.step("a", 1)
        his.append(int(message.sparse.history_hi[0]))
        held = sim.num_blocks - len(sim.free)
        # An open sentence of at most seven tokens delays the history's end by two blocks.
        assert held <= 1 + 5 + 2 + 1 + 2
    assert his == sorted(his) and his[-1] > his[0]


def test_short_and_covered_requests_stay_dense(simulate):
    sim = simulate()
    cases = {"short": (19, Reason.SHORT_CONTEXT), "covered": (23, Reason.BUDGET_COVERS)}
    for name, (prompt, reason) in cases.items():
        sim.add(name, prompt)
        sim.prefill(name)
        assert sim.step(name, 1).sparse is None
        assert sim.ledger.states[name].mode is reason
    eager = simulate(stay_dense_when_covered=False)
    eager.add("covered", 23)
    eager.prefill("covered")
    assert eager.step("covered", 1).sparse is not None


def test_with_room_requests_stay_dense_until_another_one_waits_for_blocks(simulate):
    sim = simulate(min_context_tokens_with_room=1000)
    sim.add("a", PROMPT)
    sim.prefill("a")
    assert all(sim.step("a", 1).sparse is None for _ in range(5))
    assert sim.ledger.states["a"].mode is Reason.ROOM
    waiting = 4 * len(sim.free) + 4  # one block more than are free
    sim.add("b", waiting, options=None)
    assert sim.step("b", waiting) is None, "refused"
    assert sim.step("a", 1).sparse is not None
    assert sim.step("b", waiting) is not None
    assert sim.step("a", 1).sparse is not None, "for good"


def test_with_room_requests_turn_sparse_before_the_last_blocks_are_gone(simulate):
    sim = simulate(min_context_tokens_with_room=1000, roomy_blocks=8)
    sim.add("a", PROMPT)
    sim.prefill("a")
    while len(sim.free) >= 8 + 1:
        assert sim.step("a", 1).sparse is None
    sparse = [sim.step("a", 1).sparse is not None for _ in range(10)]
    assert sparse[-1] and sparse == sorted(sparse)
    assert len(sim.free) >= 8 - 3


def test_beyond_that_context_room_changes_nothing(simulate):
    sim = simulate(min_context_tokens_with_room=PROMPT)
    sim.add("a", PROMPT)
    sim.prefill("a")
    assert sim.step("a", 1).sparse is not None


def test_a_short_prompt_turns_sparse_once_it_has_grown(simulate):
    sim = simulate()
    sim.add("a", 10)
    sim.prefill("a")
    sparse = [sim.step("a", 1).sparse is not None for _ in range(60)]
    first = sparse.index(True)
    assert all(sparse[first:]) and first > 10


def test_options_of_none_and_unknown_requests_change_nothing(simulate):
    sim = simulate()
    sim.add("off", PROMPT, options=None, reason=Reason.SWITCHED_OFF)
    message = [*sim.prefill("off"), sim.step("off", 1)][-1]
    assert message.sparse is None and not message.updates
    assert sim.ledger.states["off"].mode is Reason.SWITCHED_OFF
    sim.ledger.release("unknown")
    assert sim.ledger.advance("unknown", 50, [], 10) is None


def test_late_spans_keep_a_request_dense_until_they_are_there(simulate):
    sim = simulate()
    sim.ledger.segmentation.late = True
    sim.add("a", PROMPT)
    messages = [*sim.prefill("a"), sim.step("a", 1)]
    assert not any(m.updates or m.sparse for m in messages)
    assert sim.ledger.states["a"].mode is Reason.SEGMENTING
    sim.ledger.segmentation.late = False
    message = sim.step("a", 1)
    assert message.sparse is not None, "the whole history is copied in the step that frees it"
    assert len(message.updates[0].block_ids) >= message.sparse.history_hi[0]


def test_the_copy_quota_spreads_the_burst_and_the_history_follows(simulate):
    sim = simulate(copy_blocks_per_step=3)
    sim.add("a", PROMPT)
    sim.prefill("a")
    for _ in range(30):
        message = sim.step("a", 1)
        copied = merged([message], "block_ids")
        assert len(copied) <= 3
        if message.sparse is not None:
            pages = len(sim.ledger.states["a"].memory.pages)
            assert message.sparse.history_hi[0] <= pages, "nothing is freed before it is copied"
    assert message.sparse.history_hi[0] >= (PROMPT - 6) // 4


def test_a_history_on_its_way_to_the_host_is_not_called_covered(simulate):
    sim = simulate(copy_blocks_per_step=1)
    sim.add("a", PROMPT)
    sim.prefill("a")
    reasons = []
    while sim.step("a", 1).sparse is None:
        reasons.append(sim.ledger.states["a"].mode)
    assert reasons and set(reasons) == {Reason.COPYING}
    assert sim.ledger.states["a"].mode is Reason.SPARSE


def test_rows_of_short_sentences_take_pages_of_their_own(simulate):
    """Seven-token sentences on pages of four tokens fit; one-row pages never run short."""
    for rows_per_page in (1, 2):
        sim = simulate(rows_per_page=rows_per_page)
        sim.add("a", PROMPT)
        sim.ledger.segmentation.known["a"] = np.arange(1, PROMPT + 1, dtype=np.int32)
        sim.ledger.states["a"].segmentation = "submitted"
        messages = [*sim.prefill("a", 16), sim.step("a", 1)]
        memory = sim.ledger.states["a"].memory
        indexed = sim.ledger.states["a"].sentences_within(4 * len(memory.pages))
        assert len(memory.row_pages) * rows_per_page >= indexed
        assert set(memory.pages) <= set(memory.row_pages)
        assert len(set(memory.row_pages)) == len(memory.row_pages) == sim.ledger.pages.num_used
        assert merged(messages, "row_pages") == memory.row_pages


def test_a_full_host_pool_leaves_a_request_dense_and_whole(simulate):
    sim = simulate(num_pages=5)  # no more than the working set takes
    sim.add("a", PROMPT)
    sim.prefill("a", 20)
    before = len(sim.free)
    assert all(sim.step("a", 1).sparse is None for _ in range(3))
    assert sim.ledger.states["a"].mode is Reason.HOST_POOL_FULL
    assert len(sim.free) == before, "nothing was freed"
    sim.end("a")
    assert sim.is_clean


def test_what_has_no_host_page_stays_on_the_gpu(simulate):
    sim = simulate(num_pages=12)
    sim.add("a", PROMPT)
    sim.prefill("a", 20)
    for _ in range(40):
        rows = sim.step("a", 1).sparse
        assert rows.history_hi[0] <= 12
        assert all(block.block_id for block in sim.blocks["a"][rows.history_hi[0] :])


def test_with_wait_a_request_waits_for_pages_unless_it_can_never_get_them(simulate):
    sim = simulate(num_pages=40, wait_for_pages=True)
    for name, prompt in (("a", PROMPT), ("b", PROMPT), ("huge", 400)):
        sim.add(name, prompt)
    assert not sim.waits("a")
    sim.prefill("a")
    assert sim.waits("b"), "25 pages are reserved, 15 are left"
    assert not sim.waits("huge"), "100 pages will never be there"
    sim.end("a")
    assert not sim.waits("b")
    sim.prefill("b")
    assert sim.step("b", 1).sparse is not None


def test_shared_blocks_are_kept_where_freeing_them_gains_nothing(simulate):
    sim = simulate(num_blocks=29)
    sim.add("a", PROMPT)
    sim.prefill("a")
    for block in sim.blocks["a"]:
        block.ref_cnt += 1
    assert sim.step("a", 1).sparse is None
    assert sim.ledger.states["a"].mode is Reason.NO_GAIN
    for block in sim.blocks["a"]:
        block.ref_cnt -= 1
    assert sim.step("a", 1).sparse is not None


def test_kv_computed_under_sparse_attention_never_enters_the_prefix_cache(simulate):
    sim = simulate()
    sim.add("a", PROMPT)
    sim.prefill("a")
    assert sim.ledger.exact_tokens("a", 500) == 500
    for _ in range(10):
        sim.step("a", 1)
    assert sim.ledger.exact_tokens("a", 500) == PROMPT
    assert sim.ledger.exact_tokens("a", 50) == 50


def test_covered_histories_stay_exact(simulate):
    sim = simulate(stay_dense_when_covered=False, working_set_blocks=60)
    sim.add("a", PROMPT, options=options_of(60))
    sim.prefill("a")
    assert sim.step("a", 1).sparse is not None
    assert sim.ledger.exact_tokens("a", 500) == 500


def test_pages_of_lower_precision_are_never_exact(simulate):
    sim = simulate(stay_dense_when_covered=False, working_set_blocks=60, exact_pages=False)
    sim.add("a", PROMPT, options=options_of(60))
    sim.prefill("a")
    assert sim.ledger.exact_tokens("a", 500) == 500
    for _ in range(5):
        assert sim.step("a", 1).sparse is not None
    assert sim.ledger.exact_tokens("a", 500) == PROMPT


def options_of(blocks):
    return DecodeOptions(0, 0, 5.0, 0, blocks, 0, 8)


def test_policy_full_frees_no_more_than_its_working_set_holds(simulate):
    sim = simulate(stay_dense_when_covered=False)
    sim.add("a", PROMPT, options=options_of(5), keeps_all=True)
    sim.prefill("a")
    for _ in range(20):
        rows = sim.step("a", 1).sparse
        assert rows.history_hi[0] - rows.history_lo[0] == 5
    assert sim.ledger.exact_tokens("a", 500) == 500


def test_a_resumed_request_is_dense_until_its_generated_tokens_are_prefilled(simulate):
    sim = simulate()
    sim.add("a", PROMPT)
    sim.prefill("a")
    for _ in range(10):
        sim.step("a", 1)
    sim.end("a", finished=False)  # preempted: everything is given back
    assert len(sim.free) == sim.num_blocks and sim.ledger.pages.num_used == 0
    assert sim.ledger.exact_tokens("a", 500) == 500
    messages = sim.prefill("a", 50)
    assert messages[0].dropped, "the worker forgets the request first"
    assert not any(m.sparse for m in messages)
    message = sim.step("a", 1)
    assert message.sparse is not None
    every = [*messages, message]
    assert merged(every, "block_ids"), "copied anew"
    assert [u.options for m in every for u in m.updates][0] is not None, "told anew"


def test_a_finished_request_neither_copies_nor_frees(simulate):
    sim = simulate()
    sim.add("a", PROMPT)
    sim.prefill("a")
    sim.requests["a"].finished = True
    assert sim.ledger.advance("a", PROMPT, sim.blocks["a"], len(sim.free)) is None
    assert sim.ledger.pages.num_used == 0


def test_without_a_free_slot_a_request_stays_dense(simulate):
    sim = simulate(num_slots=1)
    for name in "ab":
        sim.add(name, PROMPT)
        sim.prefill(name)
        sim.step(name, 1)
    assert sim.ledger.states["a"].mode is Reason.SPARSE
    assert sim.ledger.states["b"].mode is Reason.HOST_POOL_FULL
    sim.end("a")
    assert sim.step("b", 1).sparse is not None
    sim.end("b")
    assert sim.is_clean


def test_a_message_says_whether_blocks_of_a_live_request_were_freed(simulate):
    sim = simulate()
    sim.add("a", PROMPT)
    assert not any(message.frees for message in sim.prefill("a", 16))
    before, moved = sim.step("a", 1), 0
    assert before.frees, "the history leaves"
    for _ in range(30):
        message = sim.step("a", 1)
        assert message.frees == (message.sparse.history_hi[0] > before.sparse.history_hi[0])
        moved += message.frees
        before = message
    assert 1 < moved < 30


def test_rows_name_their_request_and_its_length_with_this_steps_token(simulate):
    sim = simulate()
    sim.add("a", PROMPT)
    sim.prefill("a")
    for i in range(5):
        rows = sim.step("a", 1).sparse
        assert rows.request_ids == ["a"] and rows.seq_lens.tolist() == [PROMPT + i + 1]
        own = sim.blocks["a"][(PROMPT + i) // 4].block_id
        assert rows.tail_blocks.tolist() == [own]


def test_reports_reach_their_request_or_nobody(simulate):
    sim = simulate()
    sim.add("a", PROMPT)
    sim.prefill("a")
    message = sim.step("a", 1)
    slot, step = message.sparse.slots, message.step
    one = np.ones(1, np.int64)
    sim.ledger.report(StepReport(slot, 3 * one, one, np.float32([0.5]), step))
    sim.ledger.report(StepReport(slot + 1, 9 * one, one, np.float32([0.5]), step))
    summary = sim.ledger.states["a"].summary()
    assert (summary["hits"], summary["misses"], summary["hit_rate"]) == (3, 1, 0.75)
    assert summary["coverage"] == 0.5 and summary["mode"] == "sparse"


@pytest.mark.parametrize("pages", range(26, 40))
def test_the_history_is_indexed_where_the_pool_is_full(simulate, pages):
    """A sentence that ends with the last page is sealed when there is no page any more."""
    sim = simulate(num_pages=pages)
    sim.add("a", PROMPT)
    told = 0
    messages = sim.prefill("a")
    for _ in range(90):
        messages.append(sim.step("a", 1))
    for message in messages:
        for update in message.updates:
            told = max(told, int(update.sentence_ends[-1]) if len(update.sentence_ends) else 0)
        if message.sparse is not None:
            assert told >= message.sparse.history_hi[0] * 4
    assert messages[-1].sparse is not None


@pytest.mark.parametrize("finished", [True, False])
def test_what_a_slot_did_for_its_last_owner_is_not_booked_on_the_next(simulate, finished):
    """Asynchronous scheduling: a step is scheduled, its request's end becomes known, the slot has
    another owner, and only then the step's report comes."""
    sim = simulate(num_slots=1)
    sim.add("a", PROMPT)
    sim.prefill("a")
    late = sim.step("a", 1)
    sim.end("a", finished)
    next_owner = "b" if finished else "a"
    if finished:
        sim.add("b", PROMPT)
    sim.prefill(next_owner)
    own = sim.step(next_owner, 1)
    assert own.sparse.slots.tolist() == late.sparse.slots.tolist(), "the same slot"
    one = np.ones(1, np.int64)
    for message, times in ((late, 100), (own, 1)):
        report = StepReport(
            message.sparse.slots, 3 * times * one, times * one, np.float32([0.5]), message.step
        )
        sim.ledger.report(report)
    state = sim.ledger.states[next_owner]
    assert (state.hits, state.misses, state.reports) == (3, 1, 1)


@pytest.mark.parametrize("chunk", [1000, 32, 13, 4])
def test_block_groups_need_no_segmentation_and_end_with_the_blocks(simulate, chunk):
    sim = simulate()
    sim.ledger.segmentation.late = True
    sim.add("a", PROMPT, options=BLOCK_GROUPS)
    messages = sim.prefill("a", chunk)
    messages += [sim.step("a", 1) for _ in range(30)]
    assert not sim.ledger.segmentation.known, "nothing was submitted"
    ends = merged(messages, "sentence_ends")
    pages = merged(messages, "page_ids")
    assert ends[: len(pages)] == [*range(4, 4 * len(pages) + 1, 4)]
    assert merged(messages, "row_pages") == pages, "a row a block: no pages for rows alone"
    newest = messages[-1].sparse
    assert newest.history_hi[0] == (PROMPT + 29 - 6) // 4, "no open sentence holds it back"


def test_the_mean_query_of_a_block_group_starts_with_its_block(simulate):
    sim = simulate()
    sim.add("a", PROMPT, options=replace(BLOCK_GROUPS, query_kind=int(QueryKind.RUNNING_MEAN)))
    sim.prefill("a")
    starts = [bool(sim.step("a", 1).sparse.restarts[0]) for _ in range(9)]
    first = PROMPT  # position of the first token decoded
    assert starts == [True] + [(first + i) % 4 == 0 for i in range(1, 9)]


def test_the_previous_query_is_missing_in_the_first_sparse_step_only(simulate):
    sim = simulate()
    sim.add("a", PROMPT, options=replace(BLOCK_GROUPS, query_kind=int(QueryKind.PREVIOUS)))
    sim.prefill("a")
    assert [bool(sim.step("a", 1).sparse.restarts[0]) for _ in range(9)] == [True] + [False] * 8


MOVES = st.lists(
    st.tuples(
        st.sampled_from(["add", "step", "step", "step", "finish", "preempt"]),
        st.integers(0, 7),
        st.integers(1, 400),
    ),
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(MOVES, st.integers(10, 200), st.booleans(), st.integers(1, 3), st.booleans())
def test_whatever_happens_nothing_is_shared_and_all_comes_back(
    simulate, moves, num_pages, wait, rows_per_page, visits
):
    room = VisitRoom(4, 4, 1, 1, 6, 7, 140, 5) if visits else None
    sim = simulate(
        num_blocks=60 if visits else 200,
        num_pages=num_pages,
        wait_for_pages=wait,
        rows_per_page=rows_per_page,
        visit_room=room,
    )
    seen: dict[int, int] = {}
    for move, who, size in moves:
        name = f"r{who}"
        if move == "add" and name not in sim.requests:
            sim.add(name, size, options=BLOCK_GROUPS if who % 2 else OPTIONS)
        elif move == "step" and name in sim.requests:
            message = sim.step(name, min(size % 140 + 1, sim.left(name)))
            if message is None:
                sim.end(name, finished=False)
                continue
            for slot in message.dropped:
                seen.pop(slot, None)
            for update in message.updates:
                assert (update.options is None) == (update.slot in seen), "told once a tracking"
                seen[update.slot] = seen.get(update.slot, 0) + len(update.page_ids)
            if message.sparse is not None:
                assert message.sparse.history_hi[0] <= seen[int(message.sparse.slots[0])]
        elif move != "add" and name in sim.requests:
            sim.end(name, finished=move == "finish")
        memories = [s.memory for s in sim.ledger.states.values()]
        pages = [p for m in memories for p in (*m.row_pages, *m.reserved)]
        assert len(set(pages)) == len(pages) == sim.ledger.pages.num_used
        slots = [m.slot for m in memories if m.slot >= 0]
        assert len(set(slots)) == len(slots)
    for name in list(sim.requests):
        sim.end(name)
    assert sim.is_clean
