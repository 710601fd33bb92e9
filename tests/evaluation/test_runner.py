# SPDX-License-Identifier: Apache-2.0
"""The accuracy runner: every question once, on disk, and on again after an interruption."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest

from sentencekv_vllm.evaluation.divergence import Distributions
from sentencekv_vllm.evaluation.engine import Completion
from sentencekv_vllm.evaluation.items import (
    Cell,
    Item,
    Problem,
    interleave,
    make_cells,
    make_item,
    recall_problems,
)
from sentencekv_vllm.evaluation.records import Results, ResultsError
from sentencekv_vllm.evaluation.runner import run
from sentencekv_vllm.evaluation.scores import exact_line
from sentencekv_vllm.evaluation.variant import DENSE, Variant

CELLS = make_cells(["niah_single"], ["restated", "answer_prefix"], [200, 300])
VARIANTS = [Variant(DENSE), Variant("sentencekv", 256)]
SETTINGS = {"block_size": 32}
SUMMARY = {
    "mode": "sparse", "sparse_steps": 3, "sentences": 20, "hits": 5, "misses": 1, "coverage": 0.5,
}  # fmt: skip


def count(text: str) -> int:
    return len(text.split())


def ask(engine, path, questions, variants, **options):
    """Run and keep the results."""
    results = Results(path, SETTINGS)
    run(engine, questions, variants, set(results.records), results.add, **options)
    return results


def problems(num_items: int):
    return list(interleave(recall_problems(CELLS, num_items)))


class WordEngine:
    """Counts words, finds the right answer densely, and stops after `limit` calls."""

    def __init__(self, limit: int = 10**6) -> None:
        self.limit = limit
        self.calls: list[list] = []

    @property
    def asked(self):
        return [request for call in self.calls for request in call]

    def count_tokens(self, text):
        return count(text)

    def complete(self, requests):
        if len(self.calls) == self.limit:
            raise KeyboardInterrupt
        self.calls.append(list(requests))
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        dense = request.options == {"sentencekv": "off"}
        if request.measured:
            likely = 0.5 if dense else 0.25
            table = np.log(np.array([[likely, 1 - likely]] * count(request.measured), np.float32))
            forced = Distributions(np.zeros(len(table), np.int64), table)
            return Completion("", len(table), SUMMARY, forced=forced)
        assert request.max_tokens > 0
        items = [problem.make(count) for problem in problems(3)]
        right = next((i.target for i in items if i.prompt == request.prompt), "Second.")
        return Completion(right if dense else "No.", output_tokens=4, summary=SUMMARY)


def test_every_question_is_asked_in_every_variant_in_one_call(tmp_path):
    engine = WordEngine()
    results = ask(engine, tmp_path / "r.jsonl", problems(3), VARIANTS)
    assert len(engine.calls) == len(CELLS) * 3
    assert all([r.options for r in call] == [v.options for v in VARIANTS] for call in engine.calls)
    assert set(results.records) == {(c, s, v) for c in CELLS for s in range(3) for v in VARIANTS}
    assert all(r.score == (r.variant == DENSE) for r in results.records.values())


def test_a_batch_puts_several_questions_into_a_call(tmp_path):
    engine = WordEngine()
    results = ask(engine, tmp_path / "r.jsonl", problems(3), VARIANTS, batch=5)
    assert [len(call) for call in engine.calls] == [10, 10, 4]
    assert len(results.records) == 24


def test_an_interrupted_run_goes_on_and_asks_nothing_twice(tmp_path):
    path = tmp_path / "r.jsonl"
    first = WordEngine(limit=5)
    with pytest.raises(KeyboardInterrupt):
        ask(first, path, problems(3), VARIANTS)
    second = WordEngine()
    ask(second, path, problems(3), VARIANTS)
    prompts = [call[0].prompt for call in first.calls + second.calls]
    assert len(prompts) == len(set(prompts)) == len(CELLS) * 3
    assert len(path.read_text().splitlines()) == 1 + len(prompts) * len(VARIANTS)


def test_a_line_cut_off_by_a_kill_is_asked_again(tmp_path):
    path = tmp_path / "r.jsonl"
    ask(WordEngine(), path, problems(1), VARIANTS)
    whole = path.read_text()
    path.write_text(whole[:-20])
    engine = WordEngine()
    ask(engine, path, problems(1), VARIANTS)
    assert [request.options for request in engine.asked] == [VARIANTS[-1].options]
    assert path.read_text() == whole


def test_a_new_budget_or_more_items_extend_a_file(tmp_path):
    path = tmp_path / "r.jsonl"
    ask(WordEngine(), path, problems(2), VARIANTS)
    engine, more = WordEngine(), [*VARIANTS, Variant("sentencekv", 512)]
    ask(engine, path, problems(3), more)
    assert sorted(len(call) for call in engine.calls) == [1] * 2 * len(CELLS) + [3] * len(CELLS)


def test_a_second_turn_goes_on_from_the_variants_own_reply(tmp_path):
    item = Item("Q1", ("Second.",), exact_line, max_tokens=5, next_head=" Q2")
    problem = Problem(Cell("multi_turn", "restated", 300), 0, lambda count: item)
    engine = WordEngine()
    results = ask(engine, tmp_path / "r.jsonl", [problem], VARIANTS)
    first, second = engine.calls
    assert [request.prompt for request in first] == ["Q1", "Q1"]
    assert [request.prompt for request in second] == ["Q1 Second. Q2", "Q1 No. Q2"]
    assert [r.score for r in results.records.values()] == [1, 0]


def test_the_distance_from_dense_is_that_of_forced_answers(tmp_path):
    path = tmp_path / "r.jsonl"
    ask(WordEngine(), path, problems(1), VARIANTS, with_kl=True)
    engine = WordEngine()
    results = ask(engine, path, problems(1), [*VARIANTS, Variant("random", 256)], with_kl=True)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    for record in results.records.values():
        steps = count(record.target) - 1  # an answer of one word takes no decode step
        if not steps:
            assert record.kl is None
        else:
            assert record.kl == pytest.approx(0 if record.variant == DENSE else expected)
    forced = [request for request in engine.asked if request.measured]
    assert sum(r.options == {"sentencekv": "off"} for r in forced) == len(forced) / 2


def test_a_file_of_other_settings_is_refused_with_the_difference(tmp_path):
    path = tmp_path / "r.jsonl"
    Results(path, SETTINGS)
    with pytest.raises(ResultsError, match="block_size 32, this run has 16"):
        Results(path, {"block_size": 16})


def test_nothing_is_asked_after_the_deadline(tmp_path):
    engine, now = WordEngine(), time.time()
    assert not ask(engine, tmp_path / "r.jsonl", problems(1), VARIANTS, deadline=now - 1).records
    assert ask(engine, tmp_path / "r.jsonl", problems(1), VARIANTS, deadline=now + 60).records


def test_a_session_is_one_request_whose_first_turn_is_forced(tmp_path):
    engine, cells = WordEngine(), [Cell("multi_turn_session", "restated", 300)]
    (questions,) = recall_problems(cells, 1)
    ask(engine, tmp_path / "r.jsonl", questions, VARIANTS, with_kl=True)
    free, measured = engine.calls
    item = questions[0].make(count)
    twin = make_item(Cell("multi_turn", "restated", 300), 0, count)
    assert item.prompt == twin.prompt and item.references == twin.references
    assert item.forced == twin.target + twin.next_head
    assert {r.forced for r in (*free, *measured)} == {item.forced}
    assert {r.measured for r in measured} == {
        item.target
    } and item.target == f" {item.references[0]}"


def test_every_measured_token_after_a_forced_turn_is_a_decode_step(tmp_path):
    item = Item("Q1", ("b",), exact_line, max_tokens=1, forced="a", target="b")
    problem = Problem(Cell("multi_turn_session", "restated", 300), 0, lambda count: item)
    results = ask(WordEngine(), tmp_path / "r.jsonl", [problem], VARIANTS, with_kl=True)
    assert all(record.kl is not None for record in results.records.values())


def test_a_long_text_is_scored_by_its_next_tokens_and_measured_along_its_length(tmp_path):
    item = Item("Q", (), exact_line, max_tokens=0, continuation="word " * 65)
    problem = Problem(Cell("filler", "text", 300), 0, lambda count: item)
    results = ask(WordEngine(), tmp_path / "r.jsonl", [problem], VARIANTS)
    dense, sparse = (results.records[problem.cell, 0, variant] for variant in VARIANTS)
    assert (dense.score, sparse.score) == (1, 0)
    assert dense.nll == pytest.approx(math.log(2)) and sparse.nll == pytest.approx(math.log(4))
    assert dense.kl_by_length == [0, 0]
    assert sparse.kl_by_length == [pytest.approx(sparse.kl, abs=1e-6)] * 2


def test_an_interrupted_run_has_all_cells_alike():
    order = problems(2)
    assert [problem.cell for problem in order[: len(CELLS)]] == list(CELLS)


def test_cells_of_unequal_size_are_asked_to_the_end():
    by_cell = recall_problems(CELLS[:2], 3)
    order = list(interleave([by_cell[0][:1], by_cell[1]]))
    assert [(p.cell, p.seed) for p in order] == [
        (CELLS[0], 0), (CELLS[1], 0), (CELLS[1], 1), (CELLS[1], 2),
    ]  # fmt: skip


def test_styles_ask_the_same_questions_about_the_same_texts():
    restated, prefixed = (
        make_item(Cell("niah_single", style, 300), 1, count)
        for style in ("restated", "answer_prefix")
    )
    assert all(restated.target.strip() in item.prompt for item in (restated, prefixed))
    assert restated.target.endswith(prefixed.target)
    assert len(prefixed.target) < len(restated.target)


def test_depth_is_the_place_of_what_the_last_question_asks_for():
    item = make_item(Cell("multi_turn", "restated", 300), 2, count)
    place = item.prompt.index(item.references[0]) / len(item.prompt)
    assert item.depth == place


def test_the_settings_line_comes_first(tmp_path):
    path = tmp_path / "r.jsonl"
    Results(path, SETTINGS)
    assert json.loads(path.read_text()) == SETTINGS
