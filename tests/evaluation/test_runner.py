# SPDX-License-Identifier: Apache-2.0
"""The accuracy runner: every question once, on disk, and on again after an interruption."""

from __future__ import annotations

import json

import pytest

from sentencekv_vllm.evaluation.engine import DENSE, Completion, request_arguments
from sentencekv_vllm.evaluation.items import Cell, make_cells, make_item, schedule
from sentencekv_vllm.evaluation.records import Results, ResultsError
from sentencekv_vllm.evaluation.runner import is_complete, run

CELLS = make_cells(["niah_single"], ["restated", "answer_prefix"], [200, 300])
POLICIES = [DENSE, "sentencekv"]
SETTINGS = {"token_budget": 256}
SUMMARY = {"mode": "sparse", "sparse_steps": 3, "hits": 5, "misses": 1, "coverage": 0.5}


class WordEngine:
    """Counts words, finds the right answer under `dense`, and stops after `limit` prompts."""

    def __init__(self, limit: int = 10**6) -> None:
        self.limit = limit
        self.asked: list[tuple[str, tuple[str, ...]]] = []

    def count_tokens(self, text):
        return len(text.split())

    def complete(self, prompt, policies, max_tokens):
        if len(self.asked) == self.limit:
            raise KeyboardInterrupt
        self.asked.append((prompt, tuple(policies)))
        assert max_tokens > 0
        items = [make_item(cell, seed, self.count_tokens) for cell, seed in schedule(CELLS, 3)]
        right = next(item.target for item in items if item.prompt == prompt)
        return [
            Completion(right if p == DENSE else "No.", output_tokens=4, summary=SUMMARY)
            for p in policies
        ]


def test_every_question_is_asked_under_every_policy_in_one_call(tmp_path):
    engine, results = WordEngine(), Results(tmp_path / "r.jsonl", SETTINGS)
    run(engine, results, CELLS, POLICIES, num_items=3)
    assert len(engine.asked) == len(CELLS) * 3
    assert all(policies == tuple(POLICIES) for _, policies in engine.asked)
    assert set(results.records) == {(c, s, p) for c in CELLS for s in range(3) for p in POLICIES}
    assert all(r.correct == (r.policy == DENSE) for r in results.records.values())


def test_an_interrupted_run_goes_on_and_asks_nothing_twice(tmp_path):
    path = tmp_path / "r.jsonl"
    first = WordEngine(limit=5)
    with pytest.raises(KeyboardInterrupt):
        run(first, Results(path, SETTINGS), CELLS, POLICIES, num_items=3)
    second, results = WordEngine(), Results(path, SETTINGS)
    assert not is_complete(results, CELLS, POLICIES, num_items=3)
    run(second, results, CELLS, POLICIES, num_items=3)
    assert is_complete(results, CELLS, POLICIES, num_items=3)
    prompts = [prompt for prompt, _ in first.asked + second.asked]
    assert len(prompts) == len(set(prompts)) == len(CELLS) * 3
    assert len(path.read_text().splitlines()) == 1 + len(prompts) * len(POLICIES)


def test_a_line_cut_off_by_a_kill_is_asked_again(tmp_path):
    path = tmp_path / "r.jsonl"
    run(WordEngine(), Results(path, SETTINGS), CELLS, POLICIES, num_items=1)
    whole = path.read_text()
    path.write_text(whole[:-20])
    engine = WordEngine()
    run(engine, Results(path, SETTINGS), CELLS, POLICIES, num_items=1)
    assert [policies for _, policies in engine.asked] == [(POLICIES[-1],)]
    assert path.read_text() == whole


def test_a_new_policy_or_more_items_extend_a_file(tmp_path):
    path = tmp_path / "r.jsonl"
    run(WordEngine(), Results(path, SETTINGS), CELLS, [DENSE], num_items=2)
    engine = WordEngine()
    run(engine, Results(path, SETTINGS), CELLS, POLICIES, num_items=3)
    asked = [policies for _, policies in engine.asked]
    assert asked.count(("sentencekv",)) == 2 * len(CELLS)
    assert asked.count(tuple(POLICIES)) == len(CELLS)


def test_a_file_of_other_settings_is_refused_with_the_difference(tmp_path):
    path = tmp_path / "r.jsonl"
    Results(path, SETTINGS)
    with pytest.raises(ResultsError, match="token_budget 256, this run has 512"):
        Results(path, {"token_budget": 512})


def test_progress_ends_at_the_total(tmp_path):
    seen = []
    results = Results(tmp_path / "r.jsonl", SETTINGS)
    run(WordEngine(), results, CELLS, POLICIES, 2, lambda *now: seen.append(now))
    total = 2 * len(CELLS)
    assert seen == [(done, total) for done in range(total + 1)]


def test_an_interrupted_run_has_all_cells_alike():
    order = list(schedule(CELLS, 2))
    assert [cell for cell, _ in order[: len(CELLS)]] == list(CELLS)


def test_styles_ask_the_same_questions_about_the_same_texts():
    restated, prefixed = (
        make_item(Cell("niah_single", style, 300), 1, lambda s: len(s.split()))
        for style in ("restated", "answer_prefix")
    )
    assert restated.answers == prefixed.answers
    assert restated.needles == prefixed.needles
    assert len(prefixed.target) < len(restated.target)


def test_the_policy_travels_with_the_request():
    assert request_arguments(DENSE) == {"sentencekv": "off"}
    assert request_arguments("random") == {"sentencekv_policy": "random"}


def test_the_settings_line_comes_first(tmp_path):
    path = tmp_path / "r.jsonl"
    Results(path, SETTINGS)
    assert json.loads(path.read_text()) == SETTINGS
