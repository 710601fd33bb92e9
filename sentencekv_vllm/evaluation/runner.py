# SPDX-License-Identifier: Apache-2.0
"""Asks every question in every way, once; what is known already is not asked again."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

from .divergence import Measured, measure
from .engine import Completion, Engine, Request
from .items import Item, Problem
from .recall_tasks import first_line
from .records import Key, Record
from .variant import DENSE, Variant


@dataclass(frozen=True)
class _Trial:
    """A question to be decoded in one way."""

    problem: Problem
    item: Item
    variant: Variant


def run(
    engine: Engine,
    problems: Sequence[Problem],
    variants: Sequence[Variant],
    known: Container[Key],
    add: Callable[[Record], None],
    *,
    batch: int = 1,
    with_kl: bool = False,
    deadline: float | None = None,
) -> None:
    """Make a record of each question and variant.

    Args:
        engine: answers the prompts.
        problems: what to ask, in this order.
        variants: how to decode it.
        known: what needs no asking.
        add: takes the records, in order.
        batch: questions that are put to the engine together.
        with_kl: decode the known answers once more, forced, for their distance from dense.
        deadline: by `time.time()`; no question is begun after it.
    """
    for start in range(0, len(problems), batch):
        if deadline and time.time() > deadline:
            return
        trials = []
        for problem in problems[start : start + batch]:
            missing = [v for v in variants if (problem.cell, problem.seed, v) not in known]
            if missing:
                item = problem.make(engine.count_tokens)
                trials += [_Trial(problem, item, variant) for variant in missing]
        if trials:
            for record in _ask(engine, trials, with_kl):
                add(record)


def _ask(engine: Engine, trials: Sequence[_Trial], with_kl: bool) -> list[Record]:
    free = [t for t in trials if not t.item.continuation]
    answers = dict(zip(free, _answers(engine, free), strict=True)) if free else {}
    wanted = [t for t in trials if t.item.continuation or (with_kl and t.item.target)]
    forced = _forced(engine, wanted)
    measured = {t: forced[t][1] for t in forced}
    records = []
    for trial in trials:
        item = trial.item
        prompt, reply = answers.get(trial) or (item.prompt, forced[trial][0])
        if item.continuation:
            score = measured[trial].agreement
        else:
            score = item.metric(reply.text, item.references)
        tokens = engine.count_tokens(prompt) + 1
        records.append(_record(trial, score, tokens, reply, measured.get(trial)))
    return records


def _answers(engine: Engine, trials: Sequence[_Trial]) -> list[tuple[str, Completion]]:
    """The last turn's prompt and reply of each."""
    prompts = [t.item.prompt for t in trials]
    replies = list(engine.complete([_request(t, t.item.prompt) for t in trials]))
    again = [i for i, t in enumerate(trials) if t.item.next_head]
    for i in again:  # the conversation goes on from the variant's own reply
        prompts[i] += f" {first_line(replies[i].text)}{trials[i].item.next_head}"
    if again:
        second = engine.complete([_request(trials[i], prompts[i]) for i in again])
        for i, reply in zip(again, second, strict=True):
            replies[i] = reply
    return list(zip(prompts, replies, strict=True))


def _request(trial: _Trial, prompt: str) -> Request:
    item = trial.item
    return Request(prompt, item.max_tokens, trial.variant.options, forced=item.forced)


def _forced(engine: Engine, trials: Sequence[_Trial]) -> dict[_Trial, tuple[Completion, Measured]]:
    """Of the trials whose text is known word for word and takes a decode step."""

    def text(trial: _Trial) -> str:
        return trial.item.continuation or trial.item.target

    known = [t for t in trials if t.item.forced or engine.count_tokens(text(t)) > 1]
    if not known:
        return {}
    dense = {t.problem: _Trial(t.problem, t.item, Variant(DENSE)) for t in known}
    asked = [*dense.values(), *(t for t in known if t.variant.name != DENSE)]
    requests = [
        Request(t.item.prompt, 0, t.variant.options, forced=t.item.forced, measured=text(t))
        for t in asked
    ]
    replies = dict(zip(asked, engine.complete(requests), strict=True))
    found = {}
    for trial in known:
        reference, reply = replies[dense[trial.problem]].forced, replies[trial].forced
        assert reference is not None and reply is not None, "measured texts have distributions"
        found[trial] = replies[trial], measure(reference, reply, 0 if trial.item.forced else 1)
    return found


def _record(
    trial: _Trial, score: float, prompt_tokens: int, reply: Completion, measured: Measured | None
) -> Record:
    item, summary = trial.item, reply.summary
    return Record(
        task=trial.problem.cell.task,
        style=trial.problem.cell.style,
        tokens=trial.problem.cell.tokens,
        seed=trial.problem.seed,
        variant=trial.variant.name,
        budget=trial.variant.budget,
        server=trial.variant.server,
        score=score,
        text=first_line(reply.text),
        target=item.references[0] if item.references else "",
        depth=item.depth,
        kl=measured.kl if measured else None,
        kl_by_length=_curve(measured),
        nll=measured.nll if measured else None,
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


def _curve(measured: Measured | None) -> list[float] | None:
    """Only where there is something to see."""
    if measured is None or len(measured.kl_by_length) < 2:
        return None
    return [round(kl, 6) for kl in measured.kl_by_length]
