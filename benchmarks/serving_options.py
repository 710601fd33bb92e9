# SPDX-License-Identifier: Apache-2.0
"""Options of the serving benchmark, and the loads that they stand for."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from serving_engine import Case, Setup, free_host_gib, host_gib
from serving_model import Model

HOST_SHARE = 0.75  # of the free memory, for the swap pool

# Defaults of the two forms; every one of them is an option, too.
SMALL = {
    "model": "llama-4l",
    "contexts": [8192],
    "concurrency": [2, 6],
    "requests": 1,
    "output_tokens": 384,
    "block_size": 32,
    "batched_tokens": 2048,
    "settings": {"min_context_tokens": 4096},
}
FULL = {
    "model": "llama-3.1-8b",
    "contexts": [8192, 32768, 131072],
    "concurrency": [1, 4, 16],
    "requests": 2,
    "output_tokens": 256,
    "block_size": 16,
    "batched_tokens": 8192,
    "settings": {},
}
ANSWERS = {
    "modes": ["serve"],
    "model": "tiny-recall",
    "contexts": [4096],
    "concurrency": [8],
    "requests": 1,
    "output_tokens": 64,
    "block_size": 32,
    "batched_tokens": 2048,
    "dense_requests": 2,
    "settings": {"token_budget": 256, "min_context_tokens": 512},
}


def parse(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the defaults of the small or of the full form filled in."""

    def sizes(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        description=description,
        epilog="Options without a default here take that of the small or of the full form.",
    )
    add = parser.add_argument
    add("--small", action="store_true", help="the default where there is no GPU")
    add("--answers", action=argparse.BooleanOptionalAction, default=True,
        help="load tiny-recall with questions, too")  # fmt: skip
    add("--modes", default="serve,offline", help="serve, offline or both")
    add("--model", help="llama-4l, llama-3.1-8b, tiny-recall, or the folder of another model")
    add("--contexts", type=sizes, help="prompt tokens, e.g. 8192,32768")
    add("--concurrency", type=sizes, help="requests at a time, e.g. 1,8")
    add("--requests", type=int, help="of every load, in multiples of its concurrency")
    add("--rounds", type=int, default=1, help="repetitions; the table shows their medians")
    add("--output-tokens", type=int, help="of each request")
    add("--dense-requests", type=float, default=2, help="longest requests that the KV pool holds")
    add("--host-gib", type=float, help="most memory of the swap pool; default: 3/4 of the free")
    add("--block-size", type=int)
    add("--batched-tokens", type=int, help="most tokens of an engine step")
    add("--eager", action="store_true", help="no graphs; always so without a GPU")
    add("--settings", type=json.loads, help="of sentencekv, as JSON")
    add("--out", type=Path, default=Path("results/serving"), help="without .json and .csv")
    options = parser.parse_args(arguments)
    check(parser, options)
    return options


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Fill in the form's defaults and refuse what cannot run."""
    import torch

    cuda = torch.cuda.is_available()
    options.modes = options.modes.split(",")
    for mode in options.modes:
        if mode not in ("serve", "offline"):
            parser.error(f"--modes {mode}: it is neither serve nor offline")
    if options.model == "llama-3.1-8b" and not cuda:
        parser.error(
            "--model llama-3.1-8b needs a GPU, and there is none: a step of it takes seconds on a "
            "CPU. Use --small"
        )
    options.eager = options.eager or not cuda
    options.small = options.small or not cuda
    options.together = not cuda  # a GPU has memory and time for one engine only
    for name, value in (SMALL if options.small else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.dense_requests < 1:
        parser.error(
            f"--dense-requests {options.dense_requests:g}: a pool that does not hold one request "
            "refuses it; give 1 or more"
        )
    for name in ("contexts", "concurrency"):
        if min(getattr(options, name)) < 1:
            parser.error(f"--{name} {getattr(options, name)}: give numbers from 1 on")
    for name, least in (("output_tokens", 2), ("requests", 1), ("rounds", 1)):
        if getattr(options, name) < least:
            parser.error(
                f"--{name.replace('_', '-')} {getattr(options, name)}: give {least} or more"
            )


def cases(options: argparse.Namespace) -> list[Case]:
    """Every load, small ones first."""
    return [
        Case(context, concurrency, options.requests * concurrency, options.output_tokens)
        for context in sorted(options.contexts)
        for concurrency in sorted(options.concurrency)
    ]


def fitting(options: argparse.Namespace, model: Model) -> list[Case]:
    """The loads whose KV the host can hold; those left out are named.

    Raises:
        ValueError: none is left, or the model does not take the longest.
    """
    limit = HOST_SHARE * free_host_gib() if options.host_gib is None else options.host_gib
    loads = []
    for case in cases(options):
        if case.tokens > model.max_tokens:
            raise ValueError(f"{model.name} takes {model.max_tokens} tokens, not {case.tokens}")
        if (needed := host_gib(model, case)) <= limit:
            loads.append(case)
        else:
            print(f"left out: {load_name(case)}: it needs a swap pool of {needed:.1f} GiB, and "
                  f"{limit:.1f} may be taken (--host-gib)", file=sys.stderr)  # fmt: skip
    if not loads:
        raise ValueError("no load is left: take shorter --contexts or fewer at a time")
    return loads


def setup(options: argparse.Namespace) -> Setup:
    return Setup(
        options.block_size,
        options.dense_requests,
        options.batched_tokens,
        options.eager,
        options.settings,
    )


def load_name(case: Case) -> str:
    return f"{case.requests} x {case.context} tokens, {case.concurrency} at a time"
