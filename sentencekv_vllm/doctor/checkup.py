# SPDX-License-Identifier: Apache-2.0
"""All checks, in the order in which one explains the next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .builds import builds
from .finding import Finding, State
from .memory import memory
from .self_test import broken, self_test, skipped, start_engines
from .serving import ProbeError, api_process, importable, registered, supported
from .versions import versions


def checkup(with_self_test: bool) -> Iterator[Finding]:
    """Findings as they come; the self test takes most of the time (two engines start)."""
    installed = versions()
    yield from installed
    if any(f.state is State.BROKEN and f.name in ("torch", "vllm") for f in installed):
        return
    answers: dict[str, Any] | None = None
    failure: ProbeError | None = None
    try:
        if with_self_test:
            answers = start_engines()
    except ProbeError as error:
        failure = error
    try:
        facts = answers["api"] if answers else api_process()
    except ProbeError as error:
        yield importable(error)
        return
    yield supported(facts)
    yield registered("API", facts)
    yield from builds(facts["cuda"])
    yield from memory(facts["cuda"])
    if answers is not None:
        yield from self_test(answers)
    else:
        yield from [broken(failure)] if failure else skipped()
