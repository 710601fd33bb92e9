# SPDX-License-Identifier: Apache-2.0
"""Which questions are asked: the cells of an accuracy table and their items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest

from .recall_tasks import RecallPrompt, make_prompt
from .scores import Metric, exact_line

STYLES = ("restated", "answer_prefix")
"""`restated`: the answer repeats the question's key first, so most of the recall happens while
decoding. `answer_prefix`: the prompt ends with that key (RULER's style)."""

SPARE_TOKENS = 8  # a wrong answer may be longer than the right one


@dataclass(frozen=True)
class Cell:
    """Questions of one kind."""

    task: str
    style: str
    tokens: int  # prompt length, begin-of-text token included; 0: whatever a file has

    def __str__(self) -> str:
        return f"{self.task} / {self.style} / {self.tokens or 'as is'}"


@dataclass(frozen=True)
class Item:
    """One question, ready to be asked.

    Attributes:
        prompt: of the first turn.
        references: answers that the last turn is scored against.
        metric: score of the last turn's reply, 0 to 1.
        max_tokens: of a reply.
        target: expected continuation of the prompt where it is known word for word, which
            is what the distance from dense attention is measured on; else empty.
        next_head: what follows the first reply in a second turn; empty for one turn.
        depth: place of the evidence, 0 = start of the prompt; None if unknown or in several.
    """

    prompt: str
    references: tuple[str, ...]
    metric: Metric
    max_tokens: int
    target: str = ""
    next_head: str = ""
    depth: float | None = None


@dataclass(frozen=True)
class Problem:
    """An item of a cell, built when it is asked."""

    cell: Cell
    seed: int
    make: Callable[[], Item]


def make_cells(
    tasks: Sequence[str], styles: Sequence[str], lengths: Sequence[int]
) -> tuple[Cell, ...]:
    """Every combination, by length first."""
    return tuple(Cell(t, s, n) for n, t, s in product(lengths, tasks, styles))


def make_item(cell: Cell, seed: int, count_tokens: Callable[[str], int]) -> Item:
    """One recall question; `count_tokens` is the length of a text without begin-of-text.

    The styles of a task ask the same questions about the same texts.
    """
    recall = make_prompt(
        cell.task,
        cell.tokens - 1,
        seed,
        count_tokens,
        answer_prefix=cell.style == "answer_prefix",
    )
    return Item(
        prompt=recall.prompt,
        references=((recall.next_target or recall.target).strip(),),
        metric=exact_line,
        max_tokens=max(map(count_tokens, (recall.target, recall.next_target))) + SPARE_TOKENS,
        target=recall.target,
        next_head=recall.next_head,
        depth=_depth(recall),
    )


def _depth(recall: RecallPrompt) -> float | None:
    """Of the needle that the last question asks for; None if it asks for several."""
    if len(recall.needles) > 1 and not recall.next_head:
        return None
    return recall.prompt.index(recall.needles[-1]) / len(recall.prompt)


def recall_problems(
    cells: Sequence[Cell], num_items: int, count_tokens: Callable[[str], int]
) -> list[list[Problem]]:
    """The questions of each cell; seeds are 0 to `num_items` - 1."""

    def maker(cell: Cell, seed: int) -> Callable[[], Item]:
        return lambda: make_item(cell, seed, count_tokens)

    return [[Problem(c, seed, maker(c, seed)) for seed in range(num_items)] for c in cells]


def interleave(by_cell: Sequence[Sequence[Problem]]) -> Iterator[Problem]:
    """A question of each cell in turn: an interrupted run has all cells alike."""
    for row in zip_longest(*by_cell):
        yield from (problem for problem in row if problem is not None)
