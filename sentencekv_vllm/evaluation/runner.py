# SPDX-License-Identifier: Apache-2.0
"""Asks every question under every policy, once; what is on disk already is not asked again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .engine import Completion, Engine
from .items import Cell, make_item, schedule
from .recall_tasks import RecallPrompt, first_line, is_correct
from .records import Record, Results

SPARE_TOKENS = 8  # a wrong answer may be longer than the right one


def is_complete(
    results: Results, cells: Sequence[Cell], policies: Sequence[str], num_items: int
) -> bool:
    """Nothing is left to ask."""
    asked = schedule(cells, num_items)
    return all((cell, seed, p) in results.records for cell, seed in asked for p in policies)


def run(
    engine: Engine,
    results: Results,
    cells: Sequence[Cell],
    policies: Sequence[str],
    num_items: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Fill `results`.

    Args:
        engine: answers the prompts.
        results: what is known; grows by a record per question and policy.
        cells: kinds of questions.
        policies: of `sentencekv_vllm.policies`, or `engine.DENSE`.
        num_items: questions of a cell; their seeds are 0 to `num_items` - 1.
        progress: called with the number of questions done and their total.
    """
    total = len(cells) * num_items
    for done, (cell, seed) in enumerate(schedule(cells, num_items)):
        progress(done, total)
        missing = [p for p in policies if (cell, seed, p) not in results.records]
        if not missing:
            continue
        item = make_item(cell, seed, engine.count_tokens)
        max_tokens = engine.count_tokens(item.target) + SPARE_TOKENS
        completions = engine.complete(item.prompt, missing, max_tokens)
        for policy, completion in zip(missing, completions, strict=True):
            results.add(_record(cell, item, policy, completion))
    progress(total, total)


def _record(cell: Cell, item: RecallPrompt, policy: str, completion: Completion) -> Record:
    summary = completion.summary
    return Record(
        task=cell.task,
        style=cell.style,
        tokens=cell.tokens,
        seed=item.seed,
        policy=policy,
        correct=is_correct(completion.text, item),
        text=first_line(completion.text),
        target=item.target.strip(),
        output_tokens=completion.output_tokens,
        mode=summary["mode"],
        sparse_steps=summary["sparse_steps"],
        hits=summary["hits"],
        misses=summary["misses"],
        coverage=summary["coverage"],
    )
