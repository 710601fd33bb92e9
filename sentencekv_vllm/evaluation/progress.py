# SPDX-License-Identifier: Apache-2.0
"""A line on standard error, rewritten in place on a terminal."""

from __future__ import annotations

import sys
import time


class Progress:
    """Called once for each answer."""

    def __init__(self, total: int) -> None:
        """`total` answers are expected."""
        self._total = total
        self._done = 0
        self._started = 0.0  # at the first answer: an engine takes long to start
        self._said = 0.0

    def __call__(self) -> None:
        now = time.monotonic()
        self._done += 1
        self._started = self._started or now
        terminal = sys.stderr.isatty()
        last = self._done == self._total
        if not last and now - self._said < (1 if terminal else 60):
            return
        self._said = now
        rate = (self._done - 1) / max(now - self._started, 1e-9)
        left = f", {(self._total - self._done) / rate / 60:.1f} min left" if rate else ""
        print(
            f"{self._done}/{self._total} answers{left}   ",
            end="\r" if terminal and not last else "\n",
            file=sys.stderr,
            flush=True,
        )
