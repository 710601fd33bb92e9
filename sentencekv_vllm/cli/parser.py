# SPDX-License-Identifier: Apache-2.0
"""Command lines that argparse reads, with help and errors in the style of the others."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, NoReturn

from .complaint import MISUSED, complain_of_usage

TITLES = {"positional arguments": "Arguments", "options": "Options"}
"""Argparse's groups as typer names them."""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose help typer prints."""

    def print_help(self, file: Any = None) -> None:
        if file is not None:
            super().print_help(file)
            return
        import typer
        from typer.main import get_command

        app = typer.Typer(add_completion=False, rich_markup_mode="rich")
        app.command(help=self.help_text())(self.as_function())
        get_command(app).main(["--help"], prog_name=self.prog, standalone_mode=False)

    def error(self, message: str) -> NoReturn:
        complain_of_usage(self.prog, message)
        self.exit(MISUSED)

    def help_text(self) -> str:
        """Description and epilogue, as rich's markup."""
        from rich.markup import escape

        return escape("\n\n".join(text for text in (self.description, self.epilog) if text))

    def as_function(self) -> Callable[..., int]:
        """A function with a parameter for each argument, from which typer makes help and
        completion. It is never called: argparse reads the values."""
        parameters = [
            _parameter(action, TITLES.get(group.title or "", group.title or ""))
            for group in self._action_groups
            for action in group._group_actions
            if not isinstance(action, argparse._HelpAction)
        ]

        def function(**values: Any) -> int:
            raise AssertionError("argparse reads these arguments")

        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        function.__annotations__ = {p.name: p.annotation for p in parameters}
        return function


def _parameter(action: argparse.Action, panel: str) -> inspect.Parameter:
    import typer

    options: dict[str, Any] = {
        "help": _help(action),
        "show_default": False,  # it stands in the help, where it is not cut off
        "rich_help_panel": panel,
    }
    kind: Any = str
    if action.choices is not None:
        kind = Literal[tuple(action.choices)]
    elif action.nargs == 0:
        kind = bool
    elif isinstance(action.type, type) and action.type in (int, float):
        kind = action.type
    if isinstance(action.metavar, str) and action.choices is None:
        options["metavar"] = action.metavar
    if action.option_strings:
        info: Any = typer.Option(*action.option_strings, **options)
    else:
        info = typer.Argument(**options)
    required = not action.option_strings and action.nargs != "?"
    return inspect.Parameter(
        action.dest,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required or action.required else None,
        annotation=Annotated[kind if required else kind | None, info],
    )


def _help(action: argparse.Action) -> str:
    """A sentence, as the help of typer's own commands is, and the default unless it has said so."""
    from rich.markup import escape

    text, value = action.help or "", action.default
    text = text[:1].upper() + text[1:].rstrip(".") + "." * bool(text)
    if value in (None, [], {}, False) or "default:" in text:
        return escape(text)
    shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    shown = shown.replace(",", ", ")  # lines break at spaces
    return f"{escape(text)} [dim]{escape(f'[default: {shown}]')}[/dim]".strip()
