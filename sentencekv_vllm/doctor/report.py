# SPDX-License-Identifier: Apache-2.0
"""Findings as a table or as JSON."""

from __future__ import annotations

import json

from rich.console import Console
from rich.text import Text

from .finding import Finding, State, healthy

COLOURS = {
    State.OK: "green",
    State.WARNING: "yellow",
    State.BROKEN: "bold red",
    State.UNKNOWN: "cyan",
    State.UNUSED: "dim",
}
WIDTHS = (30, 12)


def show(finding: Finding) -> None:
    """A line of the table and, below it, the fix."""
    name, state = finding.name.ljust(WIDTHS[0]), str(finding.state).ljust(WIDTHS[1])
    text = Text.assemble(name, (state, COLOURS[finding.state]), finding.found)
    if finding.fix:
        text.append(f"\n{' ' * sum(WIDTHS)}fix: {finding.fix}", style="yellow")
    Console(soft_wrap=True, highlight=False).print(text)


def as_json(findings: list[Finding]) -> str:
    """One object: `healthy`, and the findings in order."""
    told = {"healthy": healthy(findings), "findings": [f.as_dict() for f in findings]}
    return json.dumps(told, indent=2)
