# SPDX-License-Identifier: Apache-2.0
"""Prompts longer than the GPU pool: what they hold never exceeds the formula, which is tight."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sentencekv_vllm.messages import DecodeOptions
from sentencekv_vllm.scheduler.reasons import Reason
from sentencekv_vllm.scheduler.visit_room import VisitRoom
from sentencekv_vllm.types import Fate, Settlement

N = 4
OPTIONS = DecodeOptions(0, 0, 5.0, 0, 3, 0, 8)


def room(in_flight=12, layers=4, halves=1, recent=6, sinks=1, working_set=5):
    """As the simulated scheduler has it: blocks of 4, sentences of seven tokens."""
    return VisitRoom(N, layers, halves, sinks, recent, 7, in_flight, working_set)


def start(simulate, sizes, num_blocks, **limits):
    return simulate(
        num_blocks=num_blocks,
        visit_room=sizes,
        sink_blocks=sizes.sink_blocks,
        recent_tokens=sizes.recent_tokens,
        working_set_blocks=sizes.working_set_blocks,
        **limits,
    )


def run(sim, name, chunks, decode=12):
    """Prefill in chunks, taken in turn, and decode; blocks held after each step, messages."""
    held, messages, turn = [], [], 0
    while sim.computed.get(name, 0) < sim.requests[name].num_prompt_tokens:
        tokens = min(chunks[turn % len(chunks)], sim.left(name))
        messages.append(sim.step(name, tokens))
        assert messages[-1] is not None, "an admitted visitor can always go on"
        held.append(sim.held(name))
        turn += 1
    for _ in range(decode):
        messages.append(sim.step(name, 1))
        assert messages[-1] is not None, "nor does it stop in decode"
        held.append(sim.held(name))
    return held, messages


SIZES = st.builds(
    room,
    in_flight=st.integers(1, 30),
    layers=st.integers(1, 6),
    halves=st.integers(1, 2),
    recent=st.integers(1, 17),
    sinks=st.integers(0, 3),
    working_set=st.integers(3, 9),
)


@settings(max_examples=200, deadline=None)
@given(SIZES, st.integers(20, 400), st.data())
def test_held_blocks_never_exceed_the_formula(simulate, sizes, prompt, data):
    asynchronous = data.draw(st.booleans())
    most = max(1, sizes.in_flight_tokens // 2) if asynchronous else sizes.in_flight_tokens
    if asynchronous and sizes.in_flight_tokens < 2:
        return
    chunks = data.draw(st.lists(st.integers(1, most), min_size=1, max_size=6))
    floor = sizes.floor(prompt)
    if -(-prompt // N) <= floor:
        return  # it fits
    sim = start(simulate, sizes, floor, asynchronous=asynchronous)
    sim.add("a", prompt)
    held, messages = run(sim, "a", chunks)
    assert max(held) <= floor
    state = sim.ledger.states["a"]
    assert state.mode is Reason.SPARSE and len(sim.private["a"]) == sizes.working_set_blocks
    visits = [m.visits for m in messages if m.visits is not None]
    staged = sizes.num_layers * sizes.private_blocks(prompt) // sizes.halves
    for rows in visits:
        assert rows.lost_hi[0] - rows.lost_lo[0] <= staged, "it has a place on the device"
    assert [u.staging for m in messages for u in m.updates if u.staging] or not visits
    sim.end("a")
    assert sim.is_clean and not sim.ledger._visiting.admitted


@settings(max_examples=100, deadline=None)
@example([150, 150, 150], [0] * 11 + [1] * 5 + [2, 0, 0, 2], 33)  # 0 fits, and draws by chunks
@given(
    st.lists(st.integers(150, 400), min_size=2, max_size=4),
    st.lists(st.integers(0, 3), min_size=20, max_size=200),
    st.integers(0, 120),
)
def test_visitors_in_any_order_never_take_each_others_blocks(simulate, prompts, turns, more):
    sizes = room()
    sim = start(simulate, sizes, sizes.floor(400) + more, num_pages=350)
    for i, prompt in enumerate(prompts):
        sim.add(str(i), prompt)
    for turn in turns:
        name = str(turn % len(prompts))
        state = sim.ledger.states.get(name)
        if state is None:
            continue
        goes_on = name in sim.ledger._visiting.admitted
        message = sim.step(name, min(12, sim.left(name)))
        assert message is not None or not goes_on, "an admitted visitor waits"
        if sim.requests[name].num_tokens > prompts[turn % len(prompts)] + 8:
            sim.end(name)
    for name in list(sim.requests):
        sim.end(name)
    assert sim.is_clean and not sim.ledger.admission.line


def test_the_formula_is_tight(simulate):
    """For some prompt and some chunks, every block of it is held."""
    for flight, recent in ((12, 6), (8, 40), (3, 1)):
        sizes, reached = room(in_flight=flight, recent=recent), 0
        for prompt, first in product(range(240, 248), range(1, flight + 1)):
            sim = start(simulate, sizes, sizes.floor(prompt))
            sim.add("a", prompt)
            chunks = [first, *[flight] * 200]
            reached = max(reached, max(run(sim, "a", chunks, decode=1)[0]) - sizes.floor(prompt))
            if reached == 0:
                break
            reached = min(reached, -1)
        assert reached == 0, (flight, recent)


def test_the_formula_grows_with_the_request_and_finds_the_longest():
    sizes = room()
    floors = [sizes.floor(tokens) for tokens in range(2000)]
    assert floors == sorted(floors)
    for blocks in range(sizes.floor(0), 80):
        longest = sizes.longest(blocks, num_pages=300)
        assert sizes.floor(longest) <= blocks and longest <= 300 * N
        assert longest == 300 * N or sizes.floor(longest + 1) > blocks
    assert sizes.longest(sizes.floor(0) - 1, num_pages=300) == 0


def test_one_block_less_is_not_enough(simulate):
    sizes = room()
    for blocks, admitted in ((sizes.floor(400), True), (sizes.floor(400) - 1, False)):
        sim = start(simulate, sizes, blocks)
        sim.add("a", 400)
        assert (sim.step("a", 12) is not None) is admitted


def test_a_prompt_that_fits_now_does_not_visit(simulate):
    sim = start(simulate, room(), 60)
    sim.add("a", 200)
    sim.prefill("a", 12)
    assert sim.ledger.admission.visitors == 0
    sim.end("a")
    assert sim.is_clean


def test_others_take_nothing_of_what_a_visitor_was_promised(simulate):
    sizes = room()
    sim = start(simulate, sizes, sizes.floor(400) + 10, num_pages=500)
    sim.add("long", 400)
    sim.add("short", 8)
    sim.add("also short", 40)
    assert sim.step("long", 12) is not None
    assert sim.step("also short", 40) is not None, "ten blocks are nobody's"
    assert sim.step("short", 8) is None, "the others are promised"
    held, _ = run(sim, "long", [12])
    assert max(held) <= sizes.floor(400)
    assert sim.step("short", 8) is not None, "its staging is given back"


def test_a_request_that_fits_some_other_time_need_not_wait(simulate):
    sizes = room(layers=8)
    sim = start(simulate, sizes, 100, num_pages=500)
    for name, prompt in (("resident", 240), ("waits", 240), ("covered", 20)):
        sim.add(name, prompt)
    assert sim.step("resident", 12) is not None
    for _ in range(18):
        sim.step("resident", 12)
    assert sim.step("waits", 12) is not None and sim.ledger.admission.visitors == 1
    assert sim.ledger.states["waits"].memory.visits
    held, messages = run(sim, "waits", [12])
    assert max(held) <= sizes.floor(240) and messages[-1].sparse is not None


def test_a_visitor_waits_for_its_sentences_and_its_pages(simulate):
    sizes = room()
    sim = start(simulate, sizes, sizes.floor(400) + 60, num_pages=150)
    sim.ledger.segmentation.late = True
    sim.add("a", 400)
    sim.add("b", 400)
    assert sim.step("a", 12) is None
    sim.ledger.segmentation.late = False
    sim.ledger.segmentation.drop("a")
    sim.ledger.states["a"].segmentation = "none"
    assert sim.step("a", 12) is not None
    assert sim.waits("b"), "two need 200 pages"
    assert sim.step("b", 12) is None
    sim.end("a")
    assert not sim.waits("b")
    assert sim.step("b", 12) is not None


def test_who_reads_the_whole_prompt_on_the_device_does_not_visit(simulate):
    sizes = room()
    settled = replace(OPTIONS, settlement=Settlement(Fate.RETAIN))
    for options, state in ((None, {}), (settled, {}), (OPTIONS, {"keeps_all": True})):
        sim = start(simulate, sizes, sizes.floor(400))
        sim.add("a", 400, options=options, **state)
        assert sim.step("a", 12) is None


def test_a_preempted_visitor_starts_again_and_prefills_its_answer(simulate):
    sizes = room()
    sim = start(simulate, sizes, sizes.floor(430))
    sim.add("a", 400)
    for steps in (3, 36, 50):
        for _ in range(steps):
            assert sim.step("a", min(12, sim.left("a"))) is not None
            assert sim.held("a") <= sizes.floor(sim.requests["a"].num_tokens)
        sim.end("a", finished=False)
        assert len(sim.free) == sim.num_blocks and not sim.ledger.pages.num_used
    _, messages = run(sim, "a", [12])
    assert messages[-1].sparse is not None


def test_a_scored_prompt_is_not_copied_out_unless_it_visits(simulate):
    sizes = room()
    sim = start(simulate, sizes, 60)
    sim.add("scored", 200, short_answer=True, reason=Reason.SHORT_ANSWER)
    messages = sim.prefill("scored", 12)
    assert not any(m.updates for m in messages) and not sim.ledger.pages.num_used
    assert sim.ledger.states["scored"].mode is Reason.SHORT_ANSWER
    sim.end("scored")
    sim.add("long", 400, short_answer=True)
    held, messages = run(sim, "long", [12], decode=0)
    assert max(held) <= sizes.floor(400) and any(m.visits for m in messages)


def test_with_too_few_rows_for_its_sentences_a_visitor_joins_short_ones(simulate):
    sizes = room()
    sim = start(simulate, sizes, sizes.floor(400), num_pages=100)
    sim.add("a", 400)
    state = sim.ledger.states["a"]
    state.segmentation, state.ends = "done", np.arange(2, 401, 2, dtype=np.int32)
    sim.ledger.segmentation.known["a"] = state.ends
    run(sim, "a", [12], decode=0)
    assert sim.ledger.joined_sentences == 1
    assert state.ends[:100].tolist() == list(range(4, 401, 4)), "one row a block"
