# SPDX-License-Identifier: Apache-2.0
"""Asks every question in every way, once; what is on disk already is not asked again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .divergence import mean_kl
from .engine import Completion, Engine, Request
from .items import Item, Problem
from .recall_tasks import first_line
from .records import Record, Results
from .variant import DENSE, Variant


@dataclass(frozen=True)
class _Trial:
    """A question to be decoded in one way."""

    problem: Problem
    item: Item
    variant: Variant


def is_complete(results: Results, problems: Iterable[Problem], variants: Sequence[Variant]) -> bool:
    """Nothing is left to ask."""
    return all((p.cell, p.seed, v) in results.records for p in problems for v in variants)


def run(
    engine: Engine,
    results: Results,
    problems: Sequence[Problem],
    variants: Sequence[Variant],
    *,
    batch: int = 1,
    with_kl: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Fill `results`.

    Args:
        engine: answers the prompts.
        results: what is known; grows by a record per question and variant.
        problems: what to ask, in this order.
        variants: how to decode it.
        batch: questions that are put to the engine together.
        with_kl: decode the known answers once more, forced, for their distance from dense.
        progress: called with the number of questions done and their total.
    """
    total = len(problems)
    for start in range(0, total, batch):
        progress(start, total)
        trials = []
        for problem in problems[start : start + batch]:
            missing = [
                v for v in variants if (problem.cell, problem.seed, v) not in results.records
            ]
            if missing:
                item = problem.make()
                trials += [_Trial(problem, item, variant) for variant in missing]
        if trials:
            _ask(engine, results, trials, with_kl)
    progress(total, total)


def _ask(engine: Engine, results: Results, trials: Sequence[_Trial], with_kl: bool) -> None:
    replies = list(engine.complete([_request(t, t.item.prompt) for t in trials]))
    prompts = [t.item.prompt for t in trials]
    again = [i for i, t in enumerate(trials) if t.item.next_head]
    for i in again:  # the conversation goes on from the variant's own reply
        prompts[i] += f" {first_line(replies[i].text)}{trials[i].item.next_head}"
    if again:
        second = engine.complete([_request(trials[i], prompts[i]) for i in again])
        for i, reply in zip(again, second, strict=True):
            replies[i] = reply
    distances = _distances(engine, trials) if with_kl else {}
    for trial, prompt, reply in zip(trials, prompts, replies, strict=True):
        prompt_tokens = engine.count_tokens(prompt) + 1
        results.add(_record(trial, prompt_tokens, reply, distances.get(trial)))


def _request(trial: _Trial, prompt: str) -> Request:
    return Request(prompt, trial.item.max_tokens, trial.variant.options)


def _distances(engine: Engine, trials: Sequence[_Trial]) -> dict[_Trial, float]:
    """Of the trials whose answer is known word for word and takes a decode step."""
    known = [t for t in trials if engine.count_tokens(t.item.target) > 1]
    dense = {t.item.prompt: _Trial(t.problem, t.item, Variant(DENSE)) for t in known}
    asked = [*dense.values(), *(t for t in known if t.variant.name != DENSE)]
    replies = engine.complete(
        [Request(t.item.prompt, 0, t.variant.options, forced=t.item.target) for t in asked]
    )
    tables = dict(zip(asked, (reply.logprobs for reply in replies), strict=True))
    distances = {}
    for trial in known:
        reference, table = tables[dense[trial.item.prompt]], tables[trial]
        assert reference is not None and table is not None, "forced requests have distributions"
        distances[trial] = mean_kl(reference, table)
    return distances


def _record(trial: _Trial, prompt_tokens: int, reply: Completion, kl: float | None) -> Record:
    item, summary = trial.item, reply.summary
    return Record(
        task=trial.problem.cell.task,
        style=trial.problem.cell.style,
        tokens=trial.problem.cell.tokens,
        seed=trial.problem.seed,
        variant=trial.variant.name,
        budget=trial.variant.budget,
        score=item.metric(reply.text, item.references),
        text=first_line(reply.text),
        target=item.references[0],
        depth=item.depth,
        kl=kl,
        output_tokens=reply.output_tokens,
        cached_tokens=reply.cached_tokens,
        mode=summary["mode"],
        sparse_steps=summary["sparse_steps"],
        sentences=summary["sentences"],
        prompt_tokens=prompt_tokens,
        hits=summary["hits"],
        misses=summary["misses"],
        coverage=summary["coverage"],
    )
