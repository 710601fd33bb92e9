# SPDX-License-Identifier: Apache-2.0
"""The same questions to sentencekv and to the stock backend, side by side, as text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .recall_tasks import RecallPrompt, first_line, is_correct
from .served import Reply

ANSWER_WIDTH = 60


@dataclass(frozen=True)
class Question:
    """One needle at one depth, asked of both."""

    tokens: int  # of the prompt
    depth: float  # position of the needle, 0 = start
    item: RecallPrompt
    ours: Reply
    stock: Reply

    @property
    def right(self) -> bool:
        return is_correct(self.ours.text, self.item)

    @property
    def stock_right(self) -> bool:
        return is_correct(self.stock.text, self.item)


@dataclass(frozen=True)
class Round:
    """All questions of about one length, and the KV blocks held while one prompt is decoded."""

    questions: Sequence[Question]
    blocks_ours: int
    blocks_stock: int

    @property
    def tokens(self) -> int:
        """Of the longest prompt."""
        return max(q.tokens for q in self.questions)

    @property
    def released(self) -> float:
        """Share of the blocks that stock attention holds."""
        return 1 - self.blocks_ours / self.blocks_stock

    def median_ms(self, side: str) -> float:
        """Milliseconds per output token of "ours" or "stock"."""
        return 1e3 * statistics.median(getattr(q, side).seconds_per_token for q in self.questions)


HEADER = (
    f"{'prompt':>6} {'depth':>5}  {'answer':<{ANSWER_WIDTH}} {'':5}"
    f"  {'hit':>4} {'in':>5} {'out':>5} {'attn':>4}  {'stock':>5} {'ours':>5}\n"
    f"{'tokens':>6} {'%':>5}  {'':{ANSWER_WIDTH}} {'':5}"
    f"  {'rate':>4} {'MiB':>5} {'MiB':>5} {'%':>4}  {'ms/token':>11}"
)
LEGEND = (
    "hit rate: selected KV that was in the working set already; in, out: swapped during the whole\n"
    "request; attn: estimated share of attention that the selection holds."
)


def row(question: Question) -> str:
    """A line of the table under `HEADER`."""
    ours, summary = question.ours, question.ours.summary
    answer = first_line(ours.text)
    if len(answer) > ANSWER_WIDTH:
        answer = f"{answer[: ANSWER_WIDTH - 3]}..."
    return (
        f"{question.tokens:6d} {100 * question.depth:5.0f}  {answer:<{ANSWER_WIDTH}}"
        f" {'right' if question.right else 'WRONG'}  {summary.get('hit_rate', 0.0):4.2f}"
        f" {ours.swapped_in_bytes / 2**20:5.1f} {ours.swapped_out_bytes / 2**20:5.1f}"
        f" {100 * (summary.get('coverage') or 0.0):4.0f}"
        f"  {1e3 * question.stock.seconds_per_token:5.2f} {1e3 * ours.seconds_per_token:5.2f}"
    )


def report(rounds: Sequence[Round]) -> str:
    """What follows the table; the last line is the verdict."""
    lines = [LEGEND, ""]
    for r in rounds:
        lines.append(
            f"{r.tokens:6d} tokens: KV blocks held while decoding: stock {r.blocks_stock}, "
            f"sentencekv {r.blocks_ours} ({r.released:.0%} released)"
        )
    for r in rounds:
        stock, ours = r.median_ms("stock"), r.median_ms("ours")
        lines.append(
            f"{r.tokens:6d} tokens: median time per output token: stock {stock:.2f} ms, "
            f"sentencekv {ours:.2f} ms ({stock / ours:.2f}x as fast)"
        )
    return "\n".join([*lines, "", verdict(rounds)])


def succeeded(rounds: Sequence[Round]) -> bool:
    """Every sentencekv answer is right, blocks were released, and something was asked."""
    questions = [q for r in rounds for q in r.questions]
    released = all(r.released > 0 for r in rounds)
    return bool(questions) and released and all(q.right for q in questions)


def verdict(rounds: Sequence[Round]) -> str:
    """One plain line."""
    questions = [q for r in rounds for q in r.questions]
    released = min((r.released for r in rounds), default=0.0)
    return (
        f"{'OK' if succeeded(rounds) else 'FAILED'}: {sum(q.right for q in questions)} of "
        f"{len(questions)} answers right (stock: {sum(q.stock_right for q in questions)}), at "
        f"least {released:.0%} of the KV blocks released while decoding."
    )
