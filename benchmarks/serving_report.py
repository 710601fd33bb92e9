# SPDX-License-Identifier: Apache-2.0
"""Rows of the serving benchmark: printed side by side, and kept as JSON and CSV."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from serving_engine import SIDES
from serving_row import Row

LOAD = ("mode", "model", "context", "concurrency", "output_tokens", "requests")
# Field, title, digits.
METRICS = (
    ("ttft_p50", "TTFT p50, ms", 1),
    ("ttft_p99", "TTFT p99, ms", 1),
    ("tpot_p50", "TPOT p50, ms", 2),
    ("tpot_p99", "TPOT p99, ms", 2),
    ("itl_p50", "ITL p50, ms", 2),
    ("itl_p99", "ITL p99, ms", 2),
    ("e2el_p50", "whole request p50, ms", 0),
    ("e2el_p99", "whole request p99, ms", 0),
    ("requests_per_s", "requests/s", 3),
    ("output_tokens_per_s", "output tokens/s", 1),
    ("total_tokens_per_s", "tokens/s, prompts included", 0),
    ("duration_s", "whole load, s", 1),
    ("running_peak", "running requests, peak", 0),
    ("running_mean", "running requests, mean", 1),
    ("kv_usage_peak", "KV pool in use, peak share", 2),
    ("preemptions", "preemptions", 0),
    ("process_mib", "process memory, peak MiB", 0),
    ("gpu_mib", "GPU memory, peak MiB", 0),
    ("prefix_hit_tokens", "tokens from the prefix cache", 0),
    ("right_answers", "right answers", 0),
    ("failed", "failed requests", 0),
    ("hit_rate", "hit rate", 3),
    ("swapped_in_mib", "swapped in, MiB", 1),
    ("swapped_out_mib", "swapped out, MiB", 1),
    ("released_blocks", "KV blocks released", 0),
    ("sparse_requests", "requests decoded sparsely", 0),
    ("dense_requests", "requests left dense", 0),
)


def table(rows: Sequence[Row]) -> str:
    """Both sides of every load, medians over the rounds, and sentencekv divided by stock."""
    loads: dict[tuple[object, ...], dict[str, list[Row]]] = {}
    for row in rows:
        key = tuple(getattr(row, name) for name in LOAD)
        loads.setdefault(key, {}).setdefault(row.side, []).append(row)
    return "\n\n".join(
        block([median(sides[side]) for side in SIDES if side in sides]) for sides in loads.values()
    )


def median(rounds: Sequence[Row]) -> Row:
    """Of every metric over repetitions of one load on one side."""
    found: dict[str, Any] = {}
    for name, *_ in METRICS:
        values = [value for row in rounds if (value := getattr(row, name)) is not None]
        found[name] = statistics.median(values) if values else None
    return replace(rounds[0], **found)


def block(pair: Sequence[Row]) -> str:
    """The table of one load."""
    first = pair[0]
    title = (
        f"{first.mode}: {first.model}, {first.requests} prompts of {first.context} tokens, "
        f"{first.concurrency} at a time, {first.output_tokens} tokens each; KV pool of "
        f"{first.kv_pool_tokens} tokens"
    )
    head = ["", *(row.side for row in pair), "ratio"]
    body = []
    for name, text, digits in METRICS:
        values = [getattr(row, name) for row in pair]
        if all(value is None for value in values):
            continue
        shown = ["-" if value is None else f"{value:.{digits}f}" for value in values]
        ratio = "-"
        if len(pair) == 2 and None not in values and values[0]:
            ratio = f"{values[1] / values[0]:.2f}"
        body.append([text, *shown, ratio])
    return "\n".join([title, "", *markdown([head, *body])])


def markdown(lines: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns are aligned in plain text, too."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def show(cells: Sequence[str]) -> str:
        parts = [cells[0].ljust(widths[0])]
        parts += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(parts)} |"

    rule = "|".join("-" * (width + 2) for width in widths)
    return [show(lines[0]), f"|{rule}|", *map(show, lines[1:])]


def provenance() -> dict[str, str]:
    """What produced the rows."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return {
        "commit": described.stdout.strip() or "unknown",
        "date": date.today().isoformat(),
        "device": device(),
        "vllm": version("vllm"),
        "torch": version("torch"),
        "command": shlex.join(["python", *sys.argv]),
    }


def device() -> str:
    """Name of the GPU, or of the processor with its number of cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return f"{found[1] if found else 'CPU'}, {os.cpu_count()} cores"


def write(stem: Path, rows: Sequence[Row], source: dict[str, str]) -> None:
    """`stem`.json and `stem`.csv."""
    records = [{**asdict(row), **source} for row in rows]
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(records, indent=1) + "\n")
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(field.name for field in fields(Row)), *source])
        writer.writeheader()
        writer.writerows(records)
