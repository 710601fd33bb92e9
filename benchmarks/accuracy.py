# SPDX-License-Identifier: Apache-2.0
"""Recall under a token budget: every policy against dense attention, on the served path.

Questions are put to the embedded tiny-recall model through vLLM with this backend. One engine
answers them all: the policy is an option of the request, and prefix caching prefills a prompt
once. An interrupted run goes on where it was.

    python -P benchmarks/accuracy.py --items 100
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentencekv_vllm.evaluation.engine import DENSE, VllmEngine
from sentencekv_vllm.evaluation.items import STYLES, make_cells
from sentencekv_vllm.evaluation.recall_tasks import TASKS
from sentencekv_vllm.evaluation.records import Results, ResultsError
from sentencekv_vllm.evaluation.runner import is_complete, run
from sentencekv_vllm.evaluation.table import Row, markdown, summarise
from sentencekv_vllm.policies import POLICIES
from sentencekv_vllm.presets import PACKAGE

MODEL = PACKAGE / "assets" / "tiny-recall"
DEFAULT_TASKS = "niah_single,niah_multiquery,variable_tracking"
DEFAULT_POLICIES = f"{DENSE},sentencekv,sentencekv-paper,streaming,random"


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


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--items", type=int, default=100, help="questions of a cell")
    parser.add_argument("--tasks", type=names(TASKS), default=DEFAULT_TASKS)
    parser.add_argument("--styles", type=names(STYLES), default=",".join(STYLES))
    parser.add_argument("--lengths", type=sizes, default="4096,8192", help="prompt tokens")
    parser.add_argument("--policies", type=names([DENSE, *POLICIES]), default=DEFAULT_POLICIES)
    parser.add_argument("--budget", type=int, default=256, help="tokens attended")
    parser.add_argument("--sinks", type=int, default=32, help="of these, first tokens")
    parser.add_argument("--recent", type=int, default=32, help="of these, last tokens")
    parser.add_argument("--working-set", type=int, default=512, help="tokens")
    parser.add_argument("--block-size", type=int, default=32, help="tokens")
    # Not spaCy, which works beside the engine: whether a request's first steps still run
    # densely would depend on the machine's load.
    parser.add_argument("--segmenter", choices=("punctuation", "fixed"), default="punctuation")
    parser.add_argument("--results", type=Path, default=Path("results/accuracy.jsonl"))
    parser.add_argument("--json", type=Path, help="write the summary here, too")
    parser.add_argument("--csv", type=Path, help="write the summary here, too")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    cells = make_cells(options.tasks, options.styles, options.lengths)
    settings = {
        "token_budget": options.budget,
        "num_sink_tokens": options.sinks,
        "recent_window": options.recent,
        "working_set_tokens": options.working_set,
        "min_context_tokens": 512,
        "host_pool_gib": 0.25,
        "segmenter": options.segmenter,
    }
    ranked_by = [POLICIES[name].index for name in options.policies if name != DENSE]
    if any(index is not None and index.vectors == 2 for index in ranked_by):
        settings["index_vectors"] = 2
    try:
        results = Results(options.results, {"block_size": options.block_size, **settings})
    except ResultsError as error:
        print(error, file=sys.stderr)
        return 2
    if not is_complete(results, cells, options.policies, options.items):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        engine = VllmEngine(
            MODEL,
            settings,
            block_size=options.block_size,
            max_prompt_tokens=max(options.lengths),
            max_policies=len(options.policies),
            kv_cache_bytes=256 << 20,
        )
        run(engine, results, cells, options.policies, options.items, Progress())
    model = json.loads((MODEL / "config.json").read_text())
    head_block_bytes = 2 * options.block_size * model["head_dim"] * 2  # K and V, bfloat16
    wanted = [r for r in results.records.values() if r.seed < options.items]
    rows = summarise(wanted, cells, options.policies, head_block_bytes)
    print(markdown(rows, options.policies))
    write(rows, settings, options)
    return 0


class Progress:
    """A line on standard error, rewritten in place on a terminal."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._first: int | None = None
        self._said = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if done < total and now - self._said < (1 if terminal else 60):
            return
        self._said = now
        self._first = done if self._first is None else self._first
        rate = (done - self._first) / max(now - self._started, 1e-9)
        left = f", {(total - done) / rate / 60:.0f} min left" if rate else ""
        print(
            f"{done}/{total} questions{left}   ",
            end="\r" if terminal and done < total else "\n",
            file=sys.stderr,
            flush=True,
        )


def write(rows: Sequence[Row], settings: dict[str, Any], options: argparse.Namespace) -> None:
    """The summary as files, where asked for."""
    flat = [row.as_dict() for row in rows]
    if options.json:
        options.json.write_text(json.dumps({"settings": settings, "rows": flat}, indent=1) + "\n")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(flat[0]))
            writer.writeheader()
            writer.writerows(flat)


if __name__ == "__main__":
    sys.exit(main())
