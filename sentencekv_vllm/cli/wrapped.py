# SPDX-License-Identifier: Apache-2.0
"""A command of typer's that hands its arguments, as they are, to a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from typer.core import TyperCommand
from typer.main import get_command


class Wrapped(TyperCommand):
    """Its options are known once somebody asks for them: a shell that completes a word."""

    parser: Callable[[], Any] | None = None

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return ctx.args

    def get_params(self, ctx: Any) -> list[Any]:
        if self.parser is None:
            return []
        import typer

        app = typer.Typer(add_completion=False)
        app.command()(self.parser().as_function())
        return list(get_command(app).params)


def wrapping(make_parser: Callable[[], Any]) -> type[Wrapped]:
    """The class of a command with the options of a parser, which is made when it is needed."""
    return type("Wrapped", (Wrapped,), {"parser": staticmethod(make_parser)})
