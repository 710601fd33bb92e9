# SPDX-License-Identifier: Apache-2.0
"""Any order of arrivals, chunks, decode steps, preemptions, aborts and late answers leaves every
block, page, row and slot with one owner, and every request reads its own KV.

`SENTENCEKV_MACHINE_STEPS` sets the number of engine steps (default 1500), `--hypothesis-seed` the
seed; a failure prints the steps that lead to it.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from hypothesis import HealthCheck, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import (  # noqa: E402
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from scheduler_model import World  # noqa: E402

from sentencekv_vllm.config import ConfigError, SentenceKVConfig  # noqa: E402
from sentencekv_vllm.plugin import register  # noqa: E402

STEPS = int(os.environ.get("SENTENCEKV_MACHINE_STEPS", "1500"))
RULES_A_RUN, STEPS_A_RULE = 25, 6  # on average
totals: Counter[str] = Counter()


def possible(variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that this version has."""
    found = []
    for variant in variants:
        try:
            SentenceKVConfig.from_dict(variant)
        except ConfigError:
            continue
        found.append(variant)
    return found


VARIANTS = possible(
    [
        {},
        {"grouping": "sentences"},
        {"grouping": "blocks"},
        {"policy": "sentencekv", "grouping": "sentences", "warm_start": True},
        {"policy": "streaming"},
        {"policy": "sentencekv-once"},
        {"policy": "sentencekv-pool"},
        {"policy": "full"},
        {"policy": "quest"},
        {"host_kv_dtype": "int8"},
        {"layer_weights": [1.5, 0.5]},
    ]
)
OPTIONS = [{}, {}, {}, {"sentencekv": "off"}, {"sentencekv_policy": "streaming"},
           {"sentencekv_grouping": "blocks"}, {"sentencekv_policy": "full"}]  # fmt: skip


class Machine(RuleBasedStateMachine):
    world: World

    @initialize(
        variant=st.sampled_from(VARIANTS),
        blocks=st.integers(20, 120) | st.integers(20, 34),
        pages=st.integers(4, 120),
        seqs=st.integers(1, 6),
        tokens=st.sampled_from([16, 33, 64, 300]),
        asynchronous=st.booleans(),
        prefix_caching=st.booleans(),
        budget=st.integers(1, 6),
        covered=st.booleans(),
        wait=st.booleans(),
        room=st.booleans(),
        rows=st.sampled_from([4, 8, 16]),
    )
    def start(self, variant, blocks, pages, seqs, tokens, asynchronous, prefix_caching, budget,
              covered, wait, room, rows):  # fmt: skip
        values: dict[str, Any] = {
            "token_budget": 16 + 20 + 16 * budget,
            "num_sink_tokens": 16,
            "recent_window": 20,
            "working_set_tokens": 16 * (budget * 2 + 2),
            "min_context_tokens": 64,
            "segmenter": "fixed",
            "max_sentence_tokens": 32,
            "stay_dense_when_covered": covered,
            "on_pool_full": "wait" if wait else "dense",
            "sentence_tokens_per_row": rows,
            **variant,
        }
        if room:
            values["min_context_tokens_with_room"] = 160
        self.world = World(
            values, blocks, pages, seqs, max(tokens, seqs), asynchronous, prefix_caching
        )

    @rule(
        family=st.integers(0, 2),
        shared=st.integers(0, 200),
        own=st.integers(0, 260) | st.integers(0, 900),
        seed=st.integers(0, 3),
        max_tokens=st.integers(1, 120),
        salt=st.sampled_from([0, 0, 0, 1, 2]),
        options=st.sampled_from(OPTIONS),
    )
    def arrive(self, family, shared, own, seed, max_tokens, salt, options):
        prefix = [1 + (7 * i * (family + 1) + i * i) % 390 for i in range(shared)]
        rest = [1 + (11 * i + 3 * seed + i * i * (seed + 2)) % 390 for i in range(own)]
        if prefix + rest:
            self.world.add(prefix + rest, max_tokens, salt, **options)

    @rule(count=st.integers(1, 2 * STEPS_A_RULE))
    def run(self, count):
        for _ in range(count):
            self.world.step()

    @precondition(lambda self: self.world.lives)
    @rule(which=st.integers(0, 20))
    def abort(self, which):
        names = sorted(self.world.lives)
        self.world.abort(names[which % len(names)])
        totals["aborts"] += 1

    @rule(late=st.booleans())
    def segment_late(self, late):
        self.world.sentences.late = late

    @precondition(lambda self: self.world.scheduler.running)
    @rule()
    def preempt(self):
        """As when blocks run short; vLLM takes the last of those that run."""
        scheduler = self.world.scheduler
        while self.world.pending:
            scheduler.update_from_output(*self.world.pending.popleft())
        for name in [n for n, life in self.world.lives.items() if life.request.is_finished()]:
            self.world._end(name)
        if scheduler.running:
            request = scheduler.running.pop()
            scheduler._preempt_request(request, 0.0)
            totals["forced preemptions"] += 1

    def teardown(self):
        if hasattr(self, "world"):
            self.world.drain()
            totals.update(self.world.seen)
            totals["steps"] += self.world.steps
            totals["requests"] += self.world.count


@pytest.fixture
def quiet():
    """Every run makes a scheduler, which has much to say."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def prompt(length, seed=0):
    return [1 + (7 * i + i * i * (seed + 1)) % 390 for i in range(length)]


def two_tenants(asynchronous):
    values = {
        "token_budget": 68, "num_sink_tokens": 16, "recent_window": 20, "working_set_tokens": 64,
        "min_context_tokens": 64, "segmenter": "fixed",
    }  # fmt: skip
    return World(values, 60, 40, 2, 64, asynchronous)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_tenants_with_the_same_prompt_and_other_salts_share_nothing(quiet, asynchronous):
    """What is read is checked against the tags of its own salt, in sparse steps, too."""
    register()
    world = two_tenants(asynchronous)
    cached = {}
    for name, salt in (("first", 1), ("other", 2), ("again", 1)):
        request = world.add(prompt(300), 20, salt)
        life = world.lives[request]
        while request in world.lives:
            world.step()
        cached[name] = life.cached
    assert cached["first"] == cached["other"] == 0 < cached["again"]
    assert world.seen["sparse rows"] > 30
    world.drain()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_tenants_side_by_side_read_their_own_pages(quiet, asynchronous):
    """One ends in every step of the other; slots, pages and working sets change hands."""
    register()
    world = two_tenants(asynchronous)
    for n in range(30):
        world.add(prompt(180 + n, seed=n), 4 + n, salt=1 + n % 2)
        for _ in range(n % 7):
            world.step()
        if n % 5 == 4:
            world.abort(sorted(world.lives)[0])
    world.drain()
    assert world.seen["sparse rows"] > 200 and world.seen["copied blocks"] > 200


@pytest.mark.parametrize(
    ("asynchronous", "wait"), [(False, "dense"), (True, "dense"), (True, "wait")]
)
def test_prompts_longer_than_the_pool_visit_and_all_end(quiet, asynchronous, wait):
    """Among short ones, ends, aborts and preemptions; what visits is what the request wrote."""
    register()
    values = {
        "token_budget": 68, "num_sink_tokens": 16, "recent_window": 20, "working_set_tokens": 64,
        "min_context_tokens": 64, "segmenter": "fixed", "max_sentence_tokens": 32,
        "on_pool_full": wait,
    }  # fmt: skip
    world = World(values, 36, 90, 4, 48, asynchronous)
    admitted = world.ledger.admission
    for n in range(60):
        options = {"sentencekv": "off"} if n % 11 == 7 else {}
        world.add(prompt(40 + 173 * n % 900, seed=n % 4), 2 + 7 * n % 90, n % 3 % 2, **options)
        for _ in range(n % 9):
            world.step()
        if n % 13 == 12:
            world.abort(sorted(world.lives)[0])
        if n % 8 == 5:
            Machine.preempt(SimpleNamespace(world=world))
    world.drain()
    assert admitted.visitors > 15 and world.seen["visiting rows"] > 150, world.seen
    assert world.seen["sparse rows"] > 300 and world.seen["refused"] < 10, world.seen


def second_turn(world):
    """A request whose answer was decoded sparsely, and one that continues it."""
    request = world.add(prompt(300), 40, 0)
    life = world.lives[request]
    while request in world.lives:
        world.step()
    world.add(life.tokens, 20, 0)
    world.drain()


def keep_everything(world):
    world.ledger.exact_tokens = lambda request_id, num_tokens: num_tokens
    del world.scheduler.kv_cache_manager.coordinator.cache_blocks  # vLLM's own, unlimited, is back


def lose_pages(world):
    world.ledger.pages.give = lambda pages: None


def mix_pages_up(world):
    apply = world.tables.apply

    world.tables.apply = lambda update: apply(replace(update, page_ids=update.page_ids[::-1]))


FAULTS = {
    "approximate KV enters the prefix cache": keep_everything,
    "pages are not given back": lose_pages,
    "pages are in another order": mix_pages_up,
}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_planted_faults_are_found(quiet, fault):
    register()
    world = two_tenants(asynchronous=True)
    if fault is None:
        second_turn(world)
        return
    FAULTS[fault](world)
    with pytest.raises(AssertionError):
        second_turn(world)


@pytest.mark.slow
def test_every_request_reads_its_own_kv_and_nothing_is_left(quiet):
    register()
    examples = max(5, STEPS // (RULES_A_RUN * STEPS_A_RULE))
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=RULES_A_RUN,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(dict(totals))
    assert totals["steps"] and totals["sparse rows"] and totals["copied blocks"]
