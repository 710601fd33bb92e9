# SPDX-License-Identifier: Apache-2.0
"""A line on standard error, rewritten in place on a terminal."""

from __future__ import annotations

import sys
import time


class Progress:
    """Called with the number of questions done and their total."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._first: int | None = None
        self._said = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if done < total and now - self._said < (1 if terminal else 60):
            return
        self._said = now
        self._first = done if self._first is None else self._first
        rate = (done - self._first) / max(now - self._started, 1e-9)
        left = f", {(total - done) / rate / 60:.0f} min left" if rate else ""
        print(
            f"{done}/{total} questions{left}   ",
            end="\r" if terminal and done < total else "\n",
            file=sys.stderr,
            flush=True,
        )
