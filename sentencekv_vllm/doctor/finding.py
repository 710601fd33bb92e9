# SPDX-License-Identifier: Apache-2.0
"""One line of the report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum


class State(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"  # it works, worse than it could
    BROKEN = "broken"
    UNKNOWN = "not checked"
    UNUSED = "not needed"  # on this machine


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        name: of the check.
        found: a value, or the reason.
        fix: the smallest one; empty where nothing is wrong.
    """

    name: str
    state: State
    found: str
    fix: str = ""

    def as_dict(self) -> dict[str, str]:
        return {name: str(value) for name, value in asdict(self).items()}


def healthy(findings: list[Finding]) -> bool:
    """Nothing is broken; what could not be checked is not."""
    return all(finding.state is not State.BROKEN for finding in findings)
