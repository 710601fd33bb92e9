# SPDX-License-Identifier: Apache-2.0
"""The accuracy runner: every question once, on disk, and on again after an interruption."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

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
from sentencekv_vllm.evaluation.runner import is_complete, run
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


def problems(num_items: int):
    return list(interleave(recall_problems(CELLS, num_items, count)))


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
        if request.forced:
            likely = 0.5 if dense else 0.25
            row = [likely, 1 - likely]
            table = np.log(np.array([row] * count(request.forced), np.float32))
            return Completion("", len(table), SUMMARY, logprobs=table)
        assert request.max_tokens > 0
        items = [problem.make() for problem in problems(3)]
        right = next((i.target for i in items if i.prompt == request.prompt), "Second.")
        return Completion(right if dense else "No.", output_tokens=4, summary=SUMMARY)


def test_every_question_is_asked_in_every_variant_in_one_call(tmp_path):
    engine, results = WordEngine(), Results(tmp_path / "r.jsonl", SETTINGS)
    run(engine, results, problems(3), VARIANTS)
    assert len(engine.calls) == len(CELLS) * 3
    assert all([r.options for r in call] == [v.options for v in VARIANTS] for call in engine.calls)
    assert set(results.records) == {(c, s, v) for c in CELLS for s in range(3) for v in VARIANTS}
    assert all(r.score == (r.variant == DENSE) for r in results.records.values())


def test_a_batch_puts_several_questions_into_a_call(tmp_path):
    engine, results = WordEngine(), Results(tmp_path / "r.jsonl", SETTINGS)
    run(engine, results, problems(3), VARIANTS, batch=5)
    assert [len(call) for call in engine.calls] == [10, 10, 4]
    assert len(results.records) == 24


def test_an_interrupted_run_goes_on_and_asks_nothing_twice(tmp_path):
    path = tmp_path / "r.jsonl"
    first = WordEngine(limit=5)
    with pytest.raises(KeyboardInterrupt):
        run(first, Results(path, SETTINGS), problems(3), VARIANTS)
    second, results = WordEngine(), Results(path, SETTINGS)
    assert not is_complete(results, problems(3), VARIANTS)
    run(second, results, problems(3), VARIANTS)
    assert is_complete(results, problems(3), VARIANTS)
    prompts = [call[0].prompt for call in first.calls + second.calls]
    assert len(prompts) == len(set(prompts)) == len(CELLS) * 3
    assert len(path.read_text().splitlines()) == 1 + len(prompts) * len(VARIANTS)


def test_a_line_cut_off_by_a_kill_is_asked_again(tmp_path):
    path = tmp_path / "r.jsonl"
    run(WordEngine(), Results(path, SETTINGS), problems(1), VARIANTS)
    whole = path.read_text()
    path.write_text(whole[:-20])
    engine = WordEngine()
    run(engine, Results(path, SETTINGS), problems(1), VARIANTS)
    assert [request.options for request in engine.asked] == [VARIANTS[-1].options]
    assert path.read_text() == whole


def test_a_new_budget_or_more_items_extend_a_file(tmp_path):
    path = tmp_path / "r.jsonl"
    run(WordEngine(), Results(path, SETTINGS), problems(2), VARIANTS)
    engine, more = WordEngine(), [*VARIANTS, Variant("sentencekv", 512)]
    run(engine, Results(path, SETTINGS), problems(3), more)
    assert sorted(len(call) for call in engine.calls) == [1] * 2 * len(CELLS) + [3] * len(CELLS)


def test_a_second_turn_goes_on_from_the_variants_own_reply(tmp_path):
    item = Item("Q1", ("Second.",), exact_line, max_tokens=5, next_head=" Q2")
    problem = Problem(Cell("multi_turn", "restated", 300), 0, lambda: item)
    engine, results = WordEngine(), Results(tmp_path / "r.jsonl", SETTINGS)
    run(engine, results, [problem], VARIANTS)
    first, second = engine.calls
    assert [request.prompt for request in first] == ["Q1", "Q1"]
    assert [request.prompt for request in second] == ["Q1 Second. Q2", "Q1 No. Q2"]
    assert [r.score for r in results.records.values()] == [1, 0]


def test_the_distance_from_dense_is_that_of_forced_answers(tmp_path):
    path = tmp_path / "r.jsonl"
    run(WordEngine(), Results(path, SETTINGS), problems(1), VARIANTS, with_kl=True)
    engine, results = WordEngine(), Results(path, SETTINGS)
    run(engine, results, problems(1), [*VARIANTS, Variant("random", 256)], with_kl=True)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    for record in results.records.values():
        steps = count(record.target) - 1  # an answer of one word takes no decode step
        if not steps:
            assert record.kl is None
        else:
            assert record.kl == pytest.approx(0 if record.variant == DENSE else expected)
    forced = [request for request in engine.asked if request.forced]
    assert sum(r.options == {"sentencekv": "off"} for r in forced) == len(forced) / 2


def test_a_file_of_other_settings_is_refused_with_the_difference(tmp_path):
    path = tmp_path / "r.jsonl"
    Results(path, SETTINGS)
    with pytest.raises(ResultsError, match="block_size 32, this run has 16"):
        Results(path, {"block_size": 16})


def test_progress_ends_at_the_total(tmp_path):
    seen = []
    results = Results(tmp_path / "r.jsonl", SETTINGS)
    run(WordEngine(), results, problems(2), VARIANTS, progress=lambda *now: seen.append(now))
    total = 2 * len(CELLS)
    assert seen == [(done, total) for done in range(total + 1)]


def test_an_interrupted_run_has_all_cells_alike():
    order = problems(2)
    assert [problem.cell for problem in order[: len(CELLS)]] == list(CELLS)


def test_cells_of_unequal_size_are_asked_to_the_end():
    by_cell = recall_problems(CELLS[:2], 3, count)
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
