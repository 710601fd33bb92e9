# SPDX-License-Identifier: Apache-2.0
"""`sentencekv doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from .complaint import FAILED, complain


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object in place of lines.")
    ] = False,
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test/--no-self-test",
            help="Start two engines of a bundled model and compare their answers.",
        ),
    ] = True,
) -> int:
    """Check versions, registration, kernels and memory, and answer a prompt.

    Exit status 1: something is broken; the fix stands below it. The self test starts an engine
    with this backend and one with plain attention, in turn.
    """
    from ..doctor import report
    from ..doctor.checkup import checkup
    from ..doctor.finding import State, healthy

    findings = []
    for finding in checkup(self_test):
        findings.append(finding)
        if not as_json:
            report.show(finding)
    if as_json:
        print(report.as_json(findings))
    if healthy(findings):
        return 0
    broken = [finding.name for finding in findings if finding.state is State.BROKEN]
    complain("sentencekv doctor", f"broken: {', '.join(broken)}")
    return FAILED
