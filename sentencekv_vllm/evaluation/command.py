# SPDX-License-Identifier: Apache-2.0
"""`sentencekv eval`: tasks x policies x budgets x contexts on the served path.

Questions are put to a vLLM engine with our backend, in this process or behind a URL. One engine
answers them all: policy, budget and ranking are options of the request, and prefix caching
prefills a prompt once. An interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..policies import POLICIES
from ..presets import PACKAGE
from .benchmark_files import FORMATS, BenchmarkFileError, check_lengths, load_problems
from .engine import Engine, VllmEngine
from .http_engine import HttpEngine, ServerRefusal
from .items import STYLES, Problem, interleave, make_cells, recall_problems
from .kv_shape import KVShape
from .markdown import markdown
from .progress import Progress
from .recall_tasks import MULTI_TURN, TASKS
from .records import Results, ResultsError
from .report import write_report
from .runner import is_complete, run
from .table import summarise
from .variant import DENSE, Variant, make_variants

MODEL = PACKAGE / "assets" / "tiny-recall"
NO_TASKS = "none"


def names(known: Sequence[str]) -> Any:
    """Parser of a comma-separated list of known names."""

    def parse(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return text.split(",")

    return parse


def sizes(text: str) -> list[int]:
    """Parser of a comma-separated list of numbers."""
    return [int(part) for part in text.split(",")]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="sentencekv eval", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    tasks, policies = [*TASKS, MULTI_TURN], [DENSE, *POLICIES]
    add("--tasks", type=names([*tasks, NO_TASKS]), default=",".join(tasks), help="or none")
    add("--styles", type=names(STYLES), default=",".join(STYLES))
    add("--contexts", type=sizes, default="4096", help="prompt tokens of the tasks")
    add("--data", action="append", default=[], metavar="FORMAT:FILE", help=", ".join(FORMATS))
    add(
        "--policies", type=names(policies), default=f"{DENSE},sentencekv,sentencekv-paper,streaming"
    )
    add("--ablation", action="store_true", help="and the rankings of evaluation.variant")
    add("--budgets", type=sizes, default="256", help="tokens attended, of each policy")
    add("--items", type=int, default=100, help="questions of a cell")
    add("--kl", action="store_true", help="and the distance from dense attention")
    add("--out", type=Path, default=Path("results/eval"), help="folder; an old run goes on")
    add("--model", default=str(MODEL), help="folder or name")
    add("--server", metavar="URL", help="of a running vllm serve, in place of an engine here")
    add("--batch", type=int, default=1, help="questions at a time, each in all variants")
    engine = parser.add_argument_group("engine in this process")
    add = engine.add_argument
    add("--sinks", type=int, default=32, help="first tokens, part of the budget")
    add("--recent", type=int, default=32, help="last tokens, part of the budget")
    add("--working-set", type=int, default=512, help="tokens")
    add("--block-size", type=int, default=32, help="tokens")
    # Not spaCy, which works beside the engine: whether a request's first steps still run
    # densely would depend on the machine's load.
    add("--segmenter", choices=("punctuation", "fixed"), default="punctuation")
    add("--host-pool-gib", type=float, default=1.0)
    add("--kv-cache-gib", type=float, default=0.5)
    add("--max-prompt-tokens", type=int, help="default: the longest context")
    options = parser.parse_args(arguments)
    if options.server and options.kl:
        parser.error("--kl needs an engine in this process: leave out --server")
    if options.kl and DENSE not in options.policies:
        parser.error(f"--kl measures the distance from {DENSE}: add it to --policies")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit status."""
    options = parse(arguments)
    variants = make_variants(options.policies, options.budgets, options.ablation)

    @cache
    def engine() -> Engine:
        return _start(options, len(variants))

    try:
        results = Results(options.out / "results.jsonl", _identity(options))
        by_cell = [load_problems(spec, options.items) for spec in options.data]
        tasks = [] if NO_TASKS in options.tasks else options.tasks
        cells = make_cells(tasks, options.styles, options.contexts)
        by_cell += recall_problems(cells, options.items, lambda text: engine().count_tokens(text))
        problems = list(interleave(by_cell))
        if not is_complete(results, problems, variants):
            if not options.server:
                check_lengths(problems, _longest(options), engine().count_tokens)
            run(
                engine(),
                results,
                problems,
                variants,
                batch=options.batch,
                with_kl=options.kl,
                progress=Progress(),
            )
    except (ResultsError, BenchmarkFileError, ServerRefusal) as error:
        print(error, file=sys.stderr)
        return 2
    _write(options, results, problems, variants)
    return 0


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """`additional_config["sentencekv"]`, without the budget, which requests have."""
    return {
        "num_sink_tokens": options.sinks,
        "recent_window": options.recent,
        "working_set_tokens": options.working_set,
        "min_context_tokens": 512,
        "host_pool_gib": options.host_pool_gib,
        "segmenter": options.segmenter,
    }


def _identity(options: argparse.Namespace) -> dict[str, Any]:
    """What all records of a file must share."""
    if options.server:
        return {"server": options.server}
    model = Path(options.model)
    name = model.name if model.is_dir() else options.model
    return {"model": name, "block_size": options.block_size, **_settings(options)}


def _longest(options: argparse.Namespace) -> int:
    return int(options.max_prompt_tokens or max(options.contexts))


def _start(options: argparse.Namespace, num_variants: int) -> Engine:
    num_requests = options.batch * (num_variants + options.kl)
    if options.server:
        return HttpEngine(options.server, num_requests)
    indexes = [POLICIES[name].index for name in options.policies if name != DENSE]
    vectors = max((index.vectors for index in indexes if index is not None), default=1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    return VllmEngine(
        options.model,
        {"token_budget": max(options.budgets), "index_vectors": vectors, **_settings(options)},
        block_size=options.block_size,
        max_prompt_tokens=_longest(options),
        max_requests=num_requests,
        kv_cache_bytes=int(options.kv_cache_gib * 2**30),
    )


def _write(
    options: argparse.Namespace,
    results: Results,
    problems: Sequence[Problem],
    variants: Sequence[Variant],
) -> None:
    """The summary on standard output and in files beside the results."""
    asked = {(p.cell, p.seed) for p in problems}
    records = [r for r in results.records.values() if (r.cell, r.seed) in asked]
    cells = list(dict.fromkeys(p.cell for p in problems))
    shape = KVShape.of_model(Path(options.model), options.block_size)
    rows = summarise(records, cells, variants, shape)
    text = markdown(rows, variants)
    print(text)
    (options.out / "summary.md").write_text(text + "\n")
    with (options.out / "summary.csv").open("w", newline="") as file:
        flat = [row.as_dict() for row in rows]
        writer = csv.DictWriter(file, fieldnames=list(flat[0]))
        writer.writeheader()
        writer.writerows(flat)
    title = ", ".join(f"{name} {value}" for name, value in _identity(options).items())
    print(write_report(options.out, rows, records, text, title), file=sys.stderr)
