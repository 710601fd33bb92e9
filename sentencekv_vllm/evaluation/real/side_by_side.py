# SPDX-License-Identifier: Apache-2.0
"""Answers and figures of the demo with a real model, as text."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from ..scores import match_all
from ..served import Reply
from .maker import Turn

WIDTH = 96
LONGEST = 280  # characters of a text that is shown


@dataclass(frozen=True)
class Asked:
    """One question and both replies."""

    turn: Turn
    ours: Reply
    stock: Reply

    def score(self, reply: Reply) -> float | None:
        """Share of the wanted strings; None for a question without them."""
        return match_all(reply.text, self.turn.wanted) if self.turn.wanted else None

    def __str__(self) -> str:
        lines = [_shown("Q", self.turn.ask.strip())]
        for name, reply in (("stock", self.stock), ("sentencekv", self.ours)):
            lines.append(_shown(name, f"{self.turn.prefix}{reply.text}".strip()))
            lines.append(f"{'':12}{self._figures(reply)}")
        return "\n".join([*lines, ""])

    def _figures(self, reply: Reply) -> str:
        score = self.score(reply)
        summary = reply.summary
        found = "" if score is None else f"{score:.0%} of what was asked for; "
        sparse = f", {summary['sparse_steps']} sparse steps" if "sparse_steps" in summary else ""
        return (
            f"[{found}first token after {reply.seconds_to_first_token:.2f} s, then "
            f"{1 / reply.seconds_per_token:.1f} tokens/s{sparse}]"
        )


def about(document: str, tokens: int) -> str:
    """Which document is asked about."""
    return f"\nA document of {tokens} tokens:\n{_shown('', document)}\n"


def report(asked: Sequence[Asked], blocks_ours: int, blocks_stock: int) -> str:
    """What follows the answers; the last line is the verdict."""
    lines = []
    for name in ("stock", "ours"):
        replies: list[Reply] = [getattr(a, name) for a in asked]
        first, *cached = (reply.seconds_to_first_token for reply in replies)
        rate = 1 / statistics.median(reply.seconds_per_token for reply in replies)
        later = f", {statistics.median(cached):.2f} s from the prefix cache" if cached else ""
        lines.append(
            f"{'sentencekv' if name == 'ours' else name:12}{first:.2f} s to the first token"
            f"{later}; {rate:.1f} tokens/s"
        )
    scored = [a for a in asked if a.turn.wanted]
    ours, stock = (sum(a.score(getattr(a, s)) or 0 for a in scored) for s in ("ours", "stock"))
    released = 1 - blocks_ours / blocks_stock
    return "\n".join(
        [
            *lines,
            f"KV blocks held while decoding: stock {blocks_stock}, sentencekv {blocks_ours}",
            "",
            f"{'OK' if released > 0 else 'FAILED'}: {ours:.2f} of {len(scored)} answers (stock: "
            f"{stock:.2f}), {released:.0%} of the KV blocks released while decoding.",
        ]
    )


def _shown(name: str, text: str) -> str:
    short = textwrap.shorten(text, LONGEST, placeholder=" ...")
    return textwrap.fill(short, WIDTH, initial_indent=f"{name:12}", subsequent_indent=" " * 12)
