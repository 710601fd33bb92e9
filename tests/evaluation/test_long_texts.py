# SPDX-License-Identifier: Apache-2.0
"""Long continuations: made to measure, about what the prompt holds, from files too."""

from __future__ import annotations

import pytest

from sentencekv_vllm.evaluation.benchmark_files import load_problems
from sentencekv_vllm.evaluation.long_texts import CONTINUATION, TEXT_TASKS, text_problems


def count(text):
    return len(text.split())


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_a_text_has_the_length_asked_for_and_goes_on_long_enough(task):
    ((problem,),) = text_problems([task], [900], 1)
    item = problem.make(count)
    assert problem.cell.is_text
    assert 0.93 * 900 <= count(item.prompt) <= 900
    assert CONTINUATION <= count(item.continuation) <= CONTINUATION + 60
    assert problem.make(count) == item


def test_every_answer_of_the_session_is_a_sentence_of_the_prompt():
    item = TEXT_TASKS["long_answers"](900, 3, count)
    body, _, question = item.prompt.rpartition("\n\nQuestion: ")
    assert question.endswith("\nAnswer:")
    answers = [turn.partition("\n\n")[0] for turn in item.continuation.split("\nAnswer:")]
    assert len(answers) > 3
    assert all(body.count(answer.strip()) == 1 for answer in answers)


def test_stretches_of_a_file_follow_each_other(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(" ".join(f"w{i}" for i in range(2000)))
    ((first, second), (_, _)) = load_problems(f"pg19:{path}", 2, [300, 400])
    items = [problem.make(count) for problem in (first, second)]
    assert [item.prompt.split()[0] for item in items] == ["w0", "w1000"]
    assert count(items[0].prompt) == 299 and count(items[0].continuation) == CONTINUATION
    assert items[0].continuation.startswith(" w299 ")


def test_a_file_that_is_too_short_says_what_it_lacks(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text("a b c")
    ((problem,),) = load_problems(f"text:{path}", 1, [300])
    with pytest.raises(ValueError, match="it ends after 3"):
        problem.make(count)
