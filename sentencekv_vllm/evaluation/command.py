# SPDX-License-Identifier: Apache-2.0
"""`sentencekv eval`: tasks x policies x budgets x contexts on the served path.

Questions are put to a vLLM engine with our backend, in this process or behind a URL. One engine
answers them all: policy, budget and ranking are options of the request, and prefix caching
prefills a prompt once. An interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

from ..cli.complaint import MISUSED, complain
from . import engine_setup
from .benchmark_files import BenchmarkFileError, check_lengths, load_problems
from .engine import Engine
from .estimate import estimate
from .http_engine import ServerRefusal
from .items import Cell, Problem, interleave, make_cells, recall_problems
from .long_texts import TEXT_TASKS, TextTooShort, text_problems
from .markdown import markdown
from .options import MODEL, parse
from .processes import ProcessError, Send, shared
from .progress import Progress
from .real import models
from .real.tasks import REAL_TASKS, real_problems
from .recall_tasks import ALL_TASKS
from .records import Key, Record, Results, ResultsError
from .report import write_report
from .runner import run
from .table import summarise
from .variant import Variant, make_variants

__all__ = ["MODEL", "main", "questions", "write_summary"]


REFUSALS = (ResultsError, BenchmarkFileError, TextTooShort, ServerRefusal, ProcessError)
"""Their messages say what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["get-model"]:
        return models.main(given[1:])
    options = parse(given)
    server = ", ".join(f"{name}={value}" for name, value in options.set)
    variants = make_variants(options.policies, options.budgets, options.ablation, server)
    try:
        results = Results(options.out / "results.jsonl", engine_setup.identity(options))
        problems = questions(options)
        _fill(options, results, problems, variants)
    except REFUSALS as error:
        complain("sentencekv eval", str(error))
        return MISUSED
    write_summary(options, results, problems, variants)
    return 0


def questions(options: argparse.Namespace) -> list[Problem]:
    """All questions, a seed of each cell after the other, with nothing made yet."""
    contexts, items = options.contexts, options.items
    seed = options.seed
    by_cell = [cell for spec in options.data for cell in load_problems(spec, items, contexts)]
    tasks = [task for task in options.tasks if task in ALL_TASKS]
    texts = [task for task in options.tasks if task in TEXT_TASKS]
    real = [task for task in options.tasks if task in REAL_TASKS]
    by_cell += recall_problems(make_cells(tasks, options.styles, contexts), items, seed)
    by_cell += text_problems(texts, contexts, items, seed)
    by_cell += real_problems(engine_setup.sources(options), real, contexts, items, seed)
    return list(interleave(by_cell))


def _fill(
    options: argparse.Namespace,
    results: Results,
    problems: Sequence[Problem],
    variants: Sequence[Variant],
) -> None:
    """Ask what is missing."""
    known = set(results.records)
    missing = [p for p in problems if any((p.cell, p.seed, v) not in known for v in variants)]
    if not missing:
        return
    print(estimate(missing, variants, options.kl, options.processes), file=sys.stderr)
    deadline = time.time() + 60 * options.minutes if options.minutes else None
    progress = Progress(len(missing) * len(variants))

    def add(record: Record) -> None:
        results.add(record)
        progress()

    if options.processes == 1:
        engine = engine_setup.start(options, variants)
        _answer(options, variants, known, deadline, engine, missing, add)
    else:
        work = partial(_share, options, variants, known, deadline)
        for record in shared(work, options.processes):
            add(record)


def _share(
    options: argparse.Namespace,
    variants: Sequence[Variant],
    known: set[Key],
    deadline: float | None,
    number: int,
    send: Send,
) -> None:
    """What one of several processes answers: whole seeds, since styles share their text."""
    problems = [p for p in questions(options) if p.seed % options.processes == number]
    engine = engine_setup.start(options, variants)
    _answer(options, variants, known, deadline, engine, problems, send)


def _answer(
    options: argparse.Namespace,
    variants: Sequence[Variant],
    known: set[Key],
    deadline: float | None,
    engine: Engine,
    problems: Sequence[Problem],
    send: Send,
) -> None:
    if not options.server:
        check_lengths(
            problems,
            engine_setup.longest_prompt(options),
            engine_setup.longest_reply(options),
            engine.count_tokens,
        )
    run(
        engine,
        problems,
        variants,
        known,
        send,
        batch=options.batch,
        with_kl=options.kl,
        deadline=deadline,
    )


def write_summary(
    options: argparse.Namespace,
    results: Results,
    problems: Sequence[Problem],
    variants: Sequence[Variant],
) -> None:
    """The summary on standard output and in files beside the results."""
    asked = {(p.cell, p.seed) for p in problems}
    records = [r for r in results.records.values() if (r.cell, r.seed) in asked]
    cells = list(dict.fromkeys(p.cell for p in problems))
    shown = _with_others(variants, results, asked)
    rows = summarise(records, cells, shown, engine_setup.kv_shape(options))
    text = markdown(rows, shown, engine_setup.history_tokens(options))
    print(text)
    (options.out / "summary.md").write_text(text + "\n")
    with (options.out / "summary.csv").open("w", newline="") as file:
        flat = [row.as_dict() for row in rows]
        writer = csv.DictWriter(file, fieldnames=list(flat[0]))
        writer.writeheader()
        writer.writerows(flat)
    title = ", ".join(f"{name} {value}" for name, value in results.settings.items())
    print(write_report(options.out, rows, records, text, title), file=sys.stderr)


def _with_others(
    variants: Sequence[Variant], results: Results, asked: set[tuple[Cell, int]]
) -> list[Variant]:
    """What was asked for, and what else the file knows about all the same questions."""
    known = defaultdict[Variant, set[tuple[Cell, int]]](set)
    for cell, seed, variant in results.records:
        if (cell, seed) in asked:
            known[variant].add((cell, seed))
    answered = set.intersection(*(known[variant] for variant in variants))
    return list(dict.fromkeys([*variants, *(v for v, have in known.items() if have >= answered)]))
