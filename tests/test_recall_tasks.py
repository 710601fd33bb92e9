# SPDX-License-Identifier: Apache-2.0
"""The recall tasks: fixed by their arguments, answerable, and checked strictly."""

from __future__ import annotations

import hashlib

import pytest

from sentencekv_vllm.evaluation.recall_tasks import (
    MULTI_TURN,
    TASKS,
    first_line,
    is_correct,
    join_sentences,
    make_prompt,
    score,
)


def test_prompts_are_those_that_the_published_accuracies_were_measured_on():
    text = "".join(make_prompt(task, 600, seed=3).prompt for task in TASKS)
    digest = "d8f849e25ba35a80cee89f115509d6361d15f0bd7f66e1c097a82e3a0045e03c"
    assert hashlib.sha256(text.encode()).hexdigest() == digest


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_holds_its_needles_and_has_about_the_length_asked_for(task):
    item = make_prompt(task, 900, seed=1)
    assert all(item.prompt.count(needle) == 1 for needle in item.needles)
    assert all(any(answer in needle for needle in item.needles) for answer in item.answers)
    assert 0.97 * 900 <= len(item.prompt.split()) <= 900
    assert item.prompt.endswith("\nAnswer:")


@pytest.mark.parametrize("task", TASKS)
def test_only_the_whole_answer_line_is_correct(task):
    item = make_prompt(task, 600, seed=2)
    assert is_correct(f"{item.target}\nQuestion: and more", item)
    assert score(item.target, item) == 1.0
    assert not is_correct(item.target + " No.", item)
    wrong = item.target.replace(item.answers[0], "nothing")
    assert not is_correct(wrong, item)
    assert score(wrong, item) < 1.0
    assert first_line(f"\n {item.target}\nx") == item.target.strip()


def test_depth_places_the_needle():
    places = [
        (item := make_prompt("niah_single", 900, seed=5, depth=d)).prompt.index(item.needles[0])
        / len(item.prompt)
        for d in (0.1, 0.5, 0.9)
    ]
    assert places == pytest.approx([0.1, 0.5, 0.9], abs=0.06)


def test_an_answer_prefix_moves_the_restated_key_into_the_prompt():
    plain = make_prompt("niah_single", 300, seed=4)
    prefixed = make_prompt("niah_single", 300, seed=4, answer_prefix=True)
    assert prefixed.prompt == plain.prompt + plain.target.removesuffix(prefixed.target)
    assert prefixed.target == f" {plain.answers[0]}."


def test_a_length_that_cannot_hold_the_needles_is_refused():
    with pytest.raises(ValueError, match="needs at least"):
        make_prompt("niah_multiquery", 20, seed=0)


@pytest.mark.parametrize("answer_prefix", [False, True])
def test_a_second_turn_asks_for_what_the_first_did_not_need(answer_prefix):
    item = make_prompt(MULTI_TURN, 600, seed=6, answer_prefix=answer_prefix)
    first, later = item.needles
    assert first.endswith(item.target) or first == item.target.strip()
    assert later.endswith(item.next_target) or later == item.next_target.strip()
    assert later not in item.target and item.answers[0] not in item.next_target
    assert item.next_head.startswith("\n\nQuestion: ")
    said = item.next_head.partition("Answer:")[2] + item.next_target
    assert said == f" {later}"
    assert item.next_head.endswith("Answer:") != answer_prefix


def test_other_tasks_have_one_turn():
    assert make_prompt("niah_single", 300, seed=0).next_head == ""


@pytest.mark.parametrize("task", TASKS)
def test_long_sentences_ask_the_same_of_the_same_texts(task):
    plain, joined = (make_prompt(task, 900, seed=6, long_sentences=x) for x in (False, True))
    assert joined.prompt.replace(";", ".") == plain.prompt
    assert (joined.target, joined.answers) == (plain.target, plain.answers)
    assert all(joined.prompt.count(needle) == 1 for needle in joined.needles)
    # Some sentences are questions or exclamations, and paragraphs end one, too.
    assert joined.prompt.count(";") > 0.4 * plain.prompt.count(". ")


def test_joined_sentences_end_where_a_third_one_or_a_question_does():
    texts = ["A is 1.", "B is 2.", "C is 3.", "Is D?", "E is 5.", "F is 6."]
    assert join_sentences(texts) == ["A is 1;", "B is 2;", "C is 3.", "Is D?", "E is 5;", "F is 6."]
