# SPDX-License-Identifier: Apache-2.0
"""Every name of vLLM's, beyond its plugin interfaces, that the glue leans on.

A row names a function, class or field, what we do with it, its parameters in every version that
was read, and, where it matters, the order of calls inside it. `check` compares a vLLM with the
rows by reading sources: the installed one in every test run, a wheel by `make guard VLLM=...`.
Imports need no rows; they are read from our own files. Nothing here imports vLLM.
"""

from __future__ import annotations

from . import attention, configuration, connector, runners, scheduler
from .bodies import BODIES
from .name import Body, Name

__all__ = ["BODIES", "NAMES", "Body", "Name"]

NAMES: tuple[Name, ...] = (
    *scheduler.ROWS,
    *connector.ROWS,
    *runners.ROWS,
    *attention.ROWS,
    *configuration.ROWS,
)
