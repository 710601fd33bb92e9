# SPDX-License-Identifier: Apache-2.0
"""Long-context benchmarks from files in the form that their authors publish; no downloads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from . import scores
from .items import Cell, Item, Problem
from .long_texts import file_problems
from .scores import Metric

Sample = Mapping[str, Any]


class BenchmarkFileError(ValueError):
    """A file is absent or of another form; the message says what is expected."""


@dataclass(frozen=True)
class Format:
    """One benchmark's file form.

    Attributes:
        example: which file is meant, for messages.
        read: makes an item of a sample of a file; may raise KeyError for a missing field.
    """

    example: str
    read: Callable[[Path, Sample], Item]


def load_problems(spec: str, num_items: int, lengths: Sequence[int] = ()) -> list[list[Problem]]:
    """The first questions of a file, as one cell; stretches of a text, a cell for each length.

    Args:
        spec: `FORMAT:FILE`, with a format of `FORMATS` or `TEXT_FORMATS`.
        num_items: most questions.
        lengths: prompt tokens of texts.

    Raises:
        BenchmarkFileError: unknown format, no such file, or a line of another form.
    """
    name, _, file = spec.partition(":")
    if not file or name not in (*FORMATS, *TEXT_FORMATS):
        known = ", ".join([*FORMATS, *TEXT_FORMATS])
        raise BenchmarkFileError(f"--data {spec!r} is not FORMAT:FILE with a format of {known}")
    path = Path(file)
    if not (path.is_file() or (path.is_dir() and name in TEXT_FORMATS)):
        example = FORMATS[name].example if name in FORMATS else TEXT_FORMATS[name]
        raise BenchmarkFileError(f"{path} does not exist: --data {name} reads {example}")
    if name in TEXT_FORMATS:
        return file_problems(path, list(lengths), num_items)
    form = FORMATS[name]
    cell = Cell(f"{name}/{_task(path)}", "file", 0)
    with path.open(encoding="utf-8") as lines:
        filled = (line for line in lines if line.strip())
        items = [_item(form, path, i, line) for i, line in enumerate(islice(filled, num_items))]
    if not items:
        raise BenchmarkFileError(f"{path} holds no question")
    return [[_problem(cell, seed, item) for seed, item in enumerate(items)]]


def check_lengths(
    problems: Sequence[Problem],
    longest: int,
    longest_reply: int,
    count_tokens: Callable[[str], int],
) -> None:
    """Refuse questions from files that an engine has no room for.

    Raises:
        BenchmarkFileError: a prompt or a reply has more tokens.
    """
    for problem in problems:
        if problem.cell.tokens:
            continue  # made to measure
        item = problem.make(count_tokens)
        tokens = count_tokens(item.prompt) + 1
        reply = count_tokens(item.forced) + item.max_tokens
        if reply > longest_reply:
            raise BenchmarkFileError(
                f"{problem.cell}, question {problem.seed}: {reply} tokens of earlier turns and "
                f"reply, the engine has room for {longest_reply}: leave the question out"
            )
        if tokens > longest:
            raise BenchmarkFileError(
                f"{problem.cell}, question {problem.seed}: {tokens} prompt tokens, the engine "
                f"takes {longest}: set --max-prompt-tokens to the longest prompt"
            )


def _problem(cell: Cell, seed: int, item: Item) -> Problem:
    return Problem(cell, seed, lambda count_tokens: item)


def _item(form: Format, path: Path, index: int, line: str) -> Item:
    try:
        return form.read(path, json.loads(line))
    except json.JSONDecodeError as error:
        raise BenchmarkFileError(f"{path}, question {index}: no JSON object: {error}") from error
    except KeyError as error:
        raise BenchmarkFileError(
            f"{path}, question {index}: no field {error}: --data reads {form.example}"
        ) from error


def _task(path: Path) -> str:
    """RULER names the folder after the task, the others the file."""
    return path.parent.name if path.stem in ("validation", "test") else path.stem


def _ruler(path: Path, sample: Sample) -> Item:
    metric = scores.match_any if _task(path).startswith("qa") else scores.match_all
    return Item(
        prompt=sample["input"] + sample.get("answer_prefix", ""),
        references=tuple(map(str, sample["outputs"])),
        metric=metric,
        max_tokens=RULER_TOKENS.get(_task(path).split("_")[0], 128),
    )


RULER_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
"""Longest reply by family of tasks, as the benchmark sets it."""

LONGBENCH_METRICS: dict[str, Metric] = {
    **dict.fromkeys(
        ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"),
        scores.token_f1,
    ),
    "passage_count": scores.right_number,
    "passage_retrieval_en": scores.right_paragraph,
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), scores.rouge_l),
    **dict.fromkeys(("lcc", "repobench-p"), scores.code_similarity),
}
LONGBENCH_CLASSES = ("trec", "lsht")
FIRST_LINE = ("triviaqa", "samsum", *LONGBENCH_CLASSES)
"""Few-shot tasks: the reply goes on with the next question."""


def _longbench(path: Path, sample: Sample) -> Item:
    task = sample["dataset"].removesuffix("_e")
    if task not in (*LONGBENCH_METRICS, *LONGBENCH_CLASSES):
        raise BenchmarkFileError(
            f"{path}: LongBench's metric of {sample['dataset']!r} is not available, use one of "
            f"{', '.join([*LONGBENCH_METRICS, *LONGBENCH_CLASSES])}"
        )
    prompts, lengths = (
        _beside(path, f"dataset2{what}.json", "LongBench's own folder config")
        for what in ("prompt", "maxlen")
    )
    classes = task in LONGBENCH_CLASSES
    metric = scores.right_class(sample["all_classes"]) if classes else LONGBENCH_METRICS[task]
    first = task in FIRST_LINE

    def score(text: str, references: Any) -> float:
        return metric(text.lstrip("\n").split("\n")[0] if first else text, references)

    return Item(
        prompt=prompts[task].format(**sample),
        references=tuple(sample["answers"]),
        metric=score,
        max_tokens=int(lengths[task]),
    )


INFINITEBENCH: dict[str, tuple[Metric, int]] = {
    "passkey": (scores.first_number, 6),
    "number_string": (scores.first_number, 12),
    "kv_retrieval": (scores.has_word, 50),
    "longbook_qa_eng": (scores.token_f1, 40),
    "longbook_sum_eng": (scores.rouge_l, 1200),
    "longdialogue_qa_eng": (scores.match_any, 40),
    "math_find": (scores.first_number, 3),
    "code_run": (scores.any_number_last, 5),
    "longbook_choice_eng": (scores.right_letter, 40),
    "code_debug": (scores.right_letter, 5),
}
"""Metric and longest reply of each task."""


def _infinitebench(path: Path, sample: Sample) -> Item:
    task = path.stem
    if task not in INFINITEBENCH:
        raise BenchmarkFileError(
            f"{path}: InfiniteBench's metric of {task!r} is not available, use one of "
            f"{', '.join(INFINITEBENCH)}"
        )
    metric, max_tokens = INFINITEBENCH[task]
    answer = sample["answer"]
    references = list(map(str, answer if isinstance(answer, list) else [answer]))
    options = ""
    if metric is scores.right_letter:
        choices = dict(zip("ABCD", sample["options"], strict=False))
        options = "".join(f"\n{letter}. {text}" for letter, text in choices.items())
        references = [letter for letter, text in choices.items() if text == references[0]]
    return Item(
        prompt=f"{sample['context']}\n\n{sample['input']}{options}\nAnswer:",
        references=tuple(references),
        metric=metric,
        max_tokens=max_tokens,
    )


def _longbench_v2(path: Path, sample: Sample) -> Item:
    choices = "".join(f"\n({letter}) {sample[f'choice_{letter}']}" for letter in "ABCD")
    return Item(
        prompt=f"{sample['context']}\n\n{sample['question']}{choices}\nThe correct answer is (",
        references=(sample["answer"],),
        metric=scores.right_letter,
        max_tokens=8,
    )


def _scbench(path: Path, sample: Sample) -> Item:
    """The last turn; those before it are given with their answers, in one request."""
    *before, last = sample["multi_turns"]
    turns = [f"\n\n{turn['input']}\nAnswer:" for turn in sample["multi_turns"]]
    answers = [f" {_text(turn['answer'])}" for turn in before]
    return Item(
        prompt=sample["context"] + turns[0],
        references=(_text(last["answer"]),),
        metric=scores.match_any,
        max_tokens=128,
        forced="".join(a + q for a, q in zip(answers, turns[1:], strict=True)),
    )


def _text(answer: Any) -> str:
    return str(answer[0] if isinstance(answer, list) else answer)


def _beside(path: Path, name: str, source: str) -> dict[str, Any]:
    """A JSON file in the same folder."""
    found = path.parent / name
    if not found.is_file():
        raise BenchmarkFileError(f"{found} does not exist: copy it there from {source}")
    return json.loads(found.read_text(encoding="utf-8"))


FORMATS: dict[str, Format] = {
    "ruler": Format("RULER's TASK/validation.jsonl (input, outputs)", _ruler),
    "longbench": Format("LongBench v1's TASK.jsonl (context, input, answers, dataset)", _longbench),
    "longbench-v2": Format(
        "LongBench v2's questions, one a line (context, question, choice_A to choice_D, answer)",
        _longbench_v2,
    ),
    "scbench": Format("SCBench's TASK.jsonl (context, multi_turns: input, answer)", _scbench),
    "infinitebench": Format("InfiniteBench's TASK.jsonl (context, input, answer)", _infinitebench),
}

TEXT_FORMATS = {
    "text": "a plain text in UTF-8, or a folder of .txt, .md, .rst and .py",
    "pg19": "a book of PG-19, a plain text in UTF-8",
}
"""Long texts for perplexity and distance from dense attention, without questions."""
