# SPDX-License-Identifier: Apache-2.0
"""Errors of every command, in one form on standard error."""

from __future__ import annotations

FAILED = 1
"""Exit status: what was checked or run has failed."""
MISUSED = 2
"""Exit status: the command line breaks a rule."""


def complain(command: str, message: str, hint: str = "") -> None:
    """Print an error; a terminal shows it in colour, and nothing breaks its lines.

    Args:
        command: as it was called, for example `sentencekv plan`.
        message: rule, value and fix.
        hint: what else helps, on a line of its own.
    """
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble((f"{command}: ", "bold red"), message)
    if hint:
        text.append(f"\n{hint}", style="dim")
    Console(stderr=True, soft_wrap=True, highlight=False).print(text)


def complain_of_usage(command: str, message: str) -> None:
    """The same about a command line, with the way to its help."""
    complain(command, message, f"{command} --help tells what it takes")
