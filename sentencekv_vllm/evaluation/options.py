# SPDX-License-Identifier: Apache-2.0
"""The command line of `sentencekv eval`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cli.parser import Parser
from ..presets import PACKAGE
from . import run_presets
from .benchmark_files import FORMATS
from .items import DEFAULT_STYLES, STYLES
from .long_texts import TEXT_TASKS
from .real.models import MODELS, full_name, models_folder
from .real.tasks import FAMILY, QUESTIONS, REAL_TASKS, SESSION_TASK, TEXTS
from .recall_tasks import ALL_TASKS
from .run_presets import PRESETS
from .variant import ALL, DENSE, parse_policies

MODEL = PACKAGE / "assets" / "tiny-recall"
NO_TASKS = "none"


def _names(known: Sequence[str]) -> Any:
    """Parser of a comma-separated list of known names."""

    def parse(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return text.split(",")

    return parse


def _tasks(text: str) -> list[str]:
    """Parser of the tasks; a family stands for its questions."""
    known = (*ALL_TASKS, *TEXT_TASKS, *REAL_TASKS, FAMILY, NO_TASKS)
    names = _names(known)(text)
    whole = [task for name in names for task in (QUESTIONS if name == FAMILY else (name,))]
    return list(dict.fromkeys(whole))


def _model(text: str) -> str:
    """Parser of a model: one of `MODELS` that is there becomes its folder."""
    folder = models_folder() / full_name(text)
    return str(folder) if not Path(text).is_dir() and folder.is_dir() else text


def _policies(text: str) -> list[str]:
    try:
        return parse_policies(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _sizes(text: str) -> list[int]:
    """Parser of a comma-separated list of numbers."""
    return [int(part) for part in text.split(",")]


def _setting(text: str) -> tuple[str, Any]:
    """Parser of NAME=VALUE, with a value as JSON has it or a plain word."""
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


DESCRIPTION = (
    "Ask tasks x policies x budgets x contexts on the served path, and compare accuracy, distance "
    "from dense attention and traffic. An interrupted run goes on where it was."
)


def parser(description: str = DESCRIPTION) -> Parser:
    """The command line."""
    found = Parser(
        prog="sentencekv eval",
        description=description,
        epilog="sentencekv eval get-model --help: small pretrained models for --model",
    )
    add = found.add_argument
    add("--preset", choices=PRESETS, help="options of evaluation.run_presets; others win")
    every = ",".join(ALL_TASKS)
    known = [*ALL_TASKS, *TEXT_TASKS, FAMILY, *REAL_TASKS, NO_TASKS]
    add("--tasks", type=_tasks, default=every, help=f"of {', '.join(known)}")
    add(
        "--styles",
        type=_names(STYLES),
        default=",".join(DEFAULT_STYLES),
        help=f"of {', '.join(STYLES)}",
    )
    add("--contexts", type=_sizes, default="4096", help="prompt tokens of the tasks")
    add(
        "--data",
        action="append",
        default=[],
        metavar="FORMAT:FILE",
        help=f"of {', '.join(FORMATS)}",
    )
    add(
        "--policies",
        type=_policies,
        default=f"{DENSE},sentencekv,sentencekv-paper,streaming",
        help=f"names, or {ALL}; with options of the request: sentencekv+query=previous",
    )
    add("--ablation", action="store_true", help="and the rankings of evaluation.variant")
    add("--budgets", type=_sizes, default="256", help="tokens attended, of each policy")
    add("--items", type=int, default=100, help="questions of a cell")
    add("--seed", type=int, default=0, help="of a cell's first question; not of --data")
    add("--text-folder", help="prose of the real tasks; default: what the machine has")
    add("--code-folder", help="Python files of the real tasks; default: the standard library")
    add("--kl", action="store_true", help="and the distance from dense attention")
    add("--out", type=Path, default=Path("results/eval"), help="folder; an old run goes on")
    add(
        "--model",
        type=_model,
        default=str(MODEL),
        help=f"folder or name; {', '.join(MODELS)} where get-model has put them; default: the "
        "embedded one",
    )
    add("--server", metavar="URL", help="of a running vllm serve, in place of an engine here")
    add("--batch", type=int, default=1, help="questions at a time, each in all variants")
    add("--requests", type=int, default=16, help="most requests at a time")
    add("--processes", type=int, default=1, help="engines, one thread each")
    add("--minutes", type=float, help="stop asking after so long; a later run goes on")
    engine = found.add_argument_group("Engine in this process")
    add = engine.add_argument
    add("--sinks", type=int, default=32, help="first tokens, part of the budget")
    add("--recent", type=int, default=32, help="last tokens, part of the budget")
    add("--working-set", type=int, help="tokens; default: 512, or the largest budget")
    add("--block-size", type=int, default=32, help="tokens")
    add(
        "--dtype",
        default="auto",
        help="of weights and KV; float32 is several times as fast on CPUs without AVX-512",
    )
    # Not spaCy, which works beside the engine: whether a request's first steps still run
    # densely would depend on the machine's load.
    add(
        "--segmenter",
        choices=("punctuation", "fixed"),
        default="punctuation",
        help="who cuts prompts into sentences",
    )
    add("--host-pool-gib", type=float, default=1.0, help="swap pool")
    add("--kv-cache-gib", type=float, default=0.5, help="KV memory of the device")
    add("--max-prompt-tokens", type=int, help="default: the longest context")
    add(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the backend; shown behind the names of the policies",
    )
    return found


def parse(arguments: Sequence[str] | None, description: str = DESCRIPTION) -> argparse.Namespace:
    """Check the arguments; exits with a message where they contradict each other."""
    line = parser(description)
    given = list(sys.argv[1:] if arguments is None else arguments)
    preset = line.parse_args(given).preset
    options = line.parse_args([*(run_presets.arguments(preset) if preset else ()), *given])
    if options.working_set is None:
        options.working_set = max(512, *options.budgets)
    texts = [task for task in options.tasks if task in (*TEXT_TASKS, *TEXTS)]
    if options.server and texts:
        line.error(f"{texts[0]} needs an engine in this process: leave out --server")
    if options.server and options.kl:
        line.error("--kl needs an engine in this process: leave out --server")
    if options.kl and DENSE not in options.policies:
        line.error(f"--kl measures the distance from {DENSE}: add it to --policies")
    if options.server and SESSION_TASK in options.tasks:
        line.error(f"{SESSION_TASK} needs an engine in this process: leave out --server, or it")
    if options.server and set(QUESTIONS) & set(options.tasks) and options.model == str(MODEL):
        line.error(
            f"{FAMILY} tasks are written in the chat template of --model: name the folder of the "
            "server's model"
        )
    if options.server and options.set:
        line.error("--set is for an engine in this process: give the server its own settings")
    return options
