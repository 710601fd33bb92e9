# SPDX-License-Identifier: Apache-2.0
"""Long-context benchmarks from files: samples in the published form, and clear refusals."""

from __future__ import annotations

import json

import pytest

from sentencekv_vllm.evaluation.benchmark_files import (
    BenchmarkFileError,
    check_lengths,
    load_problems,
)


def write(path, *samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


def only(spec):
    ((problem,),) = load_problems(spec, 10)
    return problem.cell.task, problem.make(lambda text: len(text.split()))


def test_ruler_scores_the_share_of_the_values(tmp_path):
    sample = {"index": 0, "input": "Hay. The numbers?", "outputs": ["12", "34"], "length": 9}
    path = write(tmp_path / "niah_multivalue" / "validation.jsonl", sample)
    task, item = only(f"ruler:{path}")
    assert task == "ruler/niah_multivalue"
    assert (item.prompt, item.max_tokens) == ("Hay. The numbers?", 128)
    assert item.metric("They are 12 and 99.", item.references) == 0.5


def test_ruler_ends_the_prompt_with_the_answer_prefix_and_takes_any_answer_of_a_question(tmp_path):
    sample = {"input": "Where?", "answer_prefix": " Answer:", "outputs": ["Rome", "roma"]}
    _, item = only(f"ruler:{write(tmp_path / 'qa_1' / 'validation.jsonl', sample)}")
    assert (item.prompt, item.max_tokens) == ("Where? Answer:", 32)
    assert item.metric("In Roma.", item.references) == 1


def longbench(tmp_path, task, answer):
    (tmp_path / "dataset2prompt.json").write_text(json.dumps({task: "{context}|{input}"}))
    (tmp_path / "dataset2maxlen.json").write_text(json.dumps({task: 32}))
    sample = {"input": "Q", "context": "C", "answers": [answer], "dataset": task, "length": 1}
    return write(tmp_path / f"{task}.jsonl", sample)


@pytest.mark.parametrize(
    "task,answer,reply,score",
    [
        ("hotpotqa", "the red house", "red house", 1),
        ("triviaqa", "red", "\nred\nQuestion: next", 1),
        ("hotpotqa", "red", "red\nhouse", 2 / 3),
        ("passage_count", "3", "3", 1),
        ("gov_report", "a b", "a b", 1),
        ("lcc", "x = 1", "x = 1\ny", 1),
        ("passage_retrieval_en", "Paragraph 3", "Paragraph 3", 1),
    ],
)
def test_longbench_takes_prompts_and_lengths_from_its_own_files(
    tmp_path, task, answer, reply, score
):
    name, item = only(f"longbench:{longbench(tmp_path, task, answer)}")
    assert (name, item.prompt, item.max_tokens) == (f"longbench/{task}", "C|Q", 32)
    assert item.metric(reply, item.references) == pytest.approx(score)


def test_infinitebench_scores_by_task(tmp_path):
    sample = {"id": 0, "context": "C", "input": "Key?", "answer": ["71432"], "options": []}
    _, item = only(f"infinitebench:{write(tmp_path / 'passkey.jsonl', sample)}")
    assert item.prompt == "C\n\nKey?\nAnswer:"
    assert item.metric(" 71432.", item.references) == 1


def test_a_file_is_read_up_to_the_number_of_items(tmp_path):
    sample = {"input": "x", "outputs": ["y"]}
    path = write(tmp_path / "vt" / "validation.jsonl", *[sample] * 5)
    (problems,) = load_problems(f"ruler:{path}", 3)
    assert [problem.seed for problem in problems] == [0, 1, 2]


@pytest.mark.parametrize(
    "spec,match",
    [
        ("helmet:x.jsonl", "format of ruler, longbench, longbench-v2, scbench"),
        ("ruler", "is not FORMAT:FILE"),
        ("ruler:/absent/validation.jsonl", "does not exist: --data ruler reads RULER's TASK"),
    ],
)
def test_a_wrong_specification_says_what_is_expected(spec, match):
    with pytest.raises(BenchmarkFileError, match=match):
        load_problems(spec, 1)


def test_a_sample_of_another_form_is_named(tmp_path):
    path = write(tmp_path / "vt" / "validation.jsonl", {"question": "x"})
    with pytest.raises(BenchmarkFileError, match="question 0: no field 'input'"):
        load_problems(f"ruler:{path}", 1)


def test_an_empty_file_has_no_questions(tmp_path):
    path = write(tmp_path / "vt" / "validation.jsonl")
    with pytest.raises(BenchmarkFileError, match="holds no question"):
        load_problems(f"ruler:{path}", 1)


def test_tasks_without_their_metric_are_refused(tmp_path):
    with pytest.raises(BenchmarkFileError, match="metric of 'vcsum' is not available"):
        load_problems(f"longbench:{longbench(tmp_path, 'vcsum', 'x')}", 1)
    path = write(tmp_path / "math_calc.jsonl", {"context": "", "input": "", "answer": []})
    with pytest.raises(BenchmarkFileError, match="'math_calc' is not available"):
        load_problems(f"infinitebench:{path}", 1)


def test_longbench_asks_for_its_prompts(tmp_path):
    path = longbench(tmp_path, "hotpotqa", "x")
    (tmp_path / "dataset2prompt.json").unlink()
    with pytest.raises(BenchmarkFileError, match="dataset2prompt.json does not exist: copy it"):
        load_problems(f"longbench:{path}", 1)


def test_a_class_of_longbench_is_among_those_of_its_sample(tmp_path):
    path = longbench(tmp_path, "trec", "Date")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"all_classes": ["Date", "Place"]}))
    _, item = only(f"longbench:{path}")
    assert item.metric("Date\nPlace", item.references) == 1


def test_longbench_v2_has_four_choices(tmp_path):
    sample = {"context": "C", "question": "Q", "answer": "B"}
    sample |= {f"choice_{letter}": f"text {letter}" for letter in "ABCD"}
    _, item = only(f"longbench-v2:{write(tmp_path / 'v2.jsonl', sample)}")
    assert "(B) text B" in item.prompt
    assert item.metric("B)", item.references) == 1


def test_scbench_gives_the_earlier_turns_in_the_same_request(tmp_path):
    turns = [{"input": "Q1", "answer": "one"}, {"input": "Q2", "answer": ["two"]}]
    path = write(tmp_path / "scbench_kv.jsonl", {"context": "C", "multi_turns": turns})
    _, item = only(f"scbench:{path}")
    assert item.prompt == "C\n\nQ1\nAnswer:"
    assert item.forced == " one\n\nQ2\nAnswer:"
    assert item.metric("It is two.", item.references) == 1


def test_choices_of_infinitebench_are_letters(tmp_path):
    sample = {"context": "C", "input": "Q", "options": ["x", "y", "z", "w"], "answer": ["y"]}
    _, item = only(f"infinitebench:{write(tmp_path / 'longbook_choice_eng.jsonl', sample)}")
    assert "\nB. y" in item.prompt
    assert item.references == ("B",)


def test_a_reply_that_the_engine_has_no_room_for_is_named(tmp_path):
    turns = [{"input": "Q", "answer": "word " * 50}, {"input": "Q", "answer": "x"}]
    path = write(tmp_path / "scbench_kv.jsonl", {"context": "C", "multi_turns": turns})
    (problems,) = load_problems(f"scbench:{path}", 1)
    with pytest.raises(BenchmarkFileError, match="earlier turns and reply"):
        check_lengths(problems, 100, 150, lambda text: len(text.split()))
