# SPDX-License-Identifier: Apache-2.0
"""The commands by name. Each imports what it needs when it is called: help comes at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.main import get_command

from .. import __version__
from .complaint import FAILED, MISUSED, complain_of_usage
from .doctor import doctor
from .inspect import inspect
from .plan import plan
from .wrapped import wrapping

NAME = "sentencekv"

app = typer.Typer(
    name=NAME,
    rich_markup_mode="rich",
    help="Sparse decode attention with KV offload, as a plugin of vLLM. "
    "Exit status: 0 done, 1 a check or a run has failed, 2 the command line breaks a rule.",
    epilog="A server: vllm serve MODEL --attention-backend sentencekv",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"{NAME} {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print it and end."),
    ] = False,
) -> None:
    """Options of no command."""


def _eval(arguments: Sequence[str]) -> int:
    from ..evaluation.command import main

    return main(arguments)


def _eval_parser() -> Any:
    from ..evaluation.options import parser

    return parser()


def _demo(arguments: Sequence[str]) -> int:
    from ..demo import main

    return main(arguments)


def _demo_parser() -> Any:
    from ..demo import parser

    return parser()


def _calibrate(arguments: Sequence[str]) -> int:
    from ..calibrate import main

    return main(arguments)


def _calibrate_parser() -> Any:
    from ..calibrate import parser

    return parser()


Command = tuple[str, Callable[[Sequence[str]], int], Callable[[], Any]]
WRAPPED: dict[str, Command] = {
    "eval": (
        "Measure accuracy, distance from dense attention and traffic on the served path.",
        _eval,
        _eval_parser,
    ),
    "demo": (
        "Serve needles in long texts with sentencekv and with stock attention.",
        _demo,
        _demo_parser,
    ),
    "calibrate": (
        "Find the basis of a model's keys with a text of your own.",
        _calibrate,
        _calibrate_parser,
    ),
}
"""Help of a line, function, parser."""


def _add(name: str, command: Command) -> None:
    text, function, parser = command

    @app.command(name, help=text, cls=wrapping(parser), add_help_option=False)
    def run(context: typer.Context) -> int:
        return function(context.args)


for _name, _command in WRAPPED.items():
    _add(_name, _command)


@app.command("presets")
def _presets(
    name: Annotated[
        str | None, typer.Argument(help="Of a preset; without it all are listed.")
    ] = None,
) -> int:
    """List the presets, or print the path of one, for `vllm serve --config`."""
    from ..presets import main

    return main([] if name is None else [name])


app.command("doctor")(doctor)
app.command("plan")(plan)
app.command("inspect")(inspect)

COMMANDS = (*WRAPPED, "presets", "doctor", "plan", "inspect")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = get_command(app).main(given or ["--help"], prog_name=NAME, standalone_mode=False)
    except typer.TyperException as error:
        called = getattr(getattr(error, "ctx", None), "command_path", NAME)
        message = error.format_message().replace("No such", "no")
        complain_of_usage(called, message[:1].lower() + message[1:])
        return MISUSED
    except typer.Abort:
        return FAILED
    return status if isinstance(status, int) else 0
