# SPDX-License-Identifier: Apache-2.0
"""Which questions are asked: the cells of an accuracy table and their items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from .recall_tasks import RecallPrompt, make_prompt

STYLES = ("restated", "answer_prefix")
"""`restated`: the answer repeats the question's key first, so most of the recall happens while
decoding. `answer_prefix`: the prompt ends with that key (RULER's style)."""


@dataclass(frozen=True)
class Cell:
    """Questions of one kind."""

    task: str
    style: str
    tokens: int  # prompt length, begin-of-text token included

    def __str__(self) -> str:
        return f"{self.task} / {self.style} / {self.tokens}"


def make_cells(
    tasks: Sequence[str], styles: Sequence[str], lengths: Sequence[int]
) -> tuple[Cell, ...]:
    """Every combination, by length first."""
    return tuple(Cell(t, s, n) for n, t, s in product(lengths, tasks, styles))


def make_item(cell: Cell, seed: int, count_tokens: Callable[[str], int]) -> RecallPrompt:
    """One question; `count_tokens` is the length of a text without the begin-of-text token.

    The styles of a task ask the same questions about the same texts.
    """
    return make_prompt(
        cell.task,
        cell.tokens - 1,
        seed,
        count_tokens,
        answer_prefix=cell.style == "answer_prefix",
    )


def schedule(cells: Sequence[Cell], num_items: int) -> Iterator[tuple[Cell, int]]:
    """Cells and seeds in the order they are asked: an interrupted run has all cells alike."""
    for seed in range(num_items):
        for cell in cells:
            yield cell, seed
