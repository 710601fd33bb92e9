# SPDX-License-Identifier: Apache-2.0
"""Which questions are asked: the cells of an accuracy table and their items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product, zip_longest

from .recall_tasks import SESSION, RecallPrompt, make_prompt
from .scores import Metric, exact_line

CountTokens = Callable[[str], int]
"""Length of a text without begin-of-text."""

STYLES = ("restated", "answer_prefix", "long_sentences")
"""`restated`: the answer repeats the question's key first, so most of the recall happens while
decoding. `answer_prefix`: the prompt ends with that key (RULER's style). `long_sentences`: as
`restated`, with three statements to a sentence."""
DEFAULT_STYLES = STYLES[:2]

TEXT = "text"
"""Style of cells whose items have a `continuation`."""

ANY, ANY_LENGTH = "all", -1
"""In a `Cell` that pools others."""

SPARE_TOKENS = 8  # a wrong answer may be longer than the right one


@dataclass(frozen=True)
class Cell:
    """Questions of one kind."""

    task: str
    style: str
    tokens: int  # prompt length, begin-of-text token included; 0: whatever a file has

    @property
    def is_text(self) -> bool:
        """Long texts to be decoded by force, which have no answer."""
        return self.style == TEXT

    def covers(self, other: Cell) -> bool:
        """The other's questions are among this one's; a pool stands for many cells."""
        return (
            self.task in (other.task, ANY)
            and self.style in (other.style, ANY)
            and self.tokens in (other.tokens, ANY_LENGTH)
        )

    def __str__(self) -> str:
        lengths = {0: "as is", ANY_LENGTH: ANY}
        return f"{self.task} / {self.style} / {lengths.get(self.tokens, self.tokens)}"


@dataclass(frozen=True)
class Item:
    """One question, ready to be asked.

    Attributes:
        prompt: of the first turn.
        references: answers that the last turn is scored against.
        metric: score of the last turn's reply, 0 to 1.
        max_tokens: of a reply.
        target: expected continuation of prompt and `forced` where it is known word for word, which
            is what the distance from dense attention is measured on; else empty.
        next_head: what follows the first reply in a second turn; empty for one turn.
        forced: decoded first, whatever the model would say: the first turn's answer and the
            second question, in one request. What a policy has dropped by then stays dropped.
        continuation: a long text to be decoded by force in place of an answer; the score is the
            share of its tokens that the model would have chosen.
        depth: place of the evidence, 0 = start of the prompt; None if unknown or in several.
    """

    prompt: str
    references: tuple[str, ...]
    metric: Metric
    max_tokens: int
    target: str = ""
    next_head: str = ""
    forced: str = ""
    continuation: str = ""
    depth: float | None = None


@dataclass(frozen=True)
class Problem:
    """An item of a cell, built when it is asked."""

    cell: Cell
    seed: int
    make: Callable[[CountTokens], Item]


def make_cells(
    tasks: Sequence[str], styles: Sequence[str], lengths: Sequence[int]
) -> tuple[Cell, ...]:
    """Every combination, by length first."""
    return tuple(Cell(t, s, n) for n, t, s in product(lengths, tasks, styles))


def pools(cells: Sequence[Cell]) -> list[Cell]:
    """A pool for each task and for each length, of cells with answers; none that one cell fills."""
    cells = [cell for cell in cells if not cell.is_text]
    by_task = [Cell(task, ANY, ANY_LENGTH) for task in dict.fromkeys(c.task for c in cells)]
    by_length = [Cell(ANY, ANY, tokens) for tokens in dict.fromkeys(c.tokens for c in cells)]
    return [
        pool
        for group in (by_task, by_length)
        if len(group) > 1
        for pool in group
        if sum(map(pool.covers, cells)) > 1
    ]


def make_item(cell: Cell, seed: int, count_tokens: CountTokens) -> Item:
    """One recall question.

    The styles of a task ask the same questions about the same texts, which semicolons join under
    `long_sentences`.
    """
    recall = make_prompt(
        cell.task,
        cell.tokens - 1,
        seed,
        count_tokens,
        answer_prefix=cell.style == "answer_prefix",
        long_sentences=cell.style == "long_sentences",
    )
    session = cell.task == SESSION
    return Item(
        prompt=recall.prompt,
        references=((recall.next_target or recall.target).strip(),),
        metric=exact_line,
        max_tokens=max(map(count_tokens, (recall.target, recall.next_target))) + SPARE_TOKENS,
        target=recall.next_target if session else recall.target,
        next_head="" if session else recall.next_head,
        forced=recall.target + recall.next_head if session else "",
        depth=_depth(recall),
    )


def _depth(recall: RecallPrompt) -> float | None:
    """Of the needle that the last question asks for; None if it asks for several."""
    if len(recall.needles) > 1 and not recall.next_head:
        return None
    return recall.prompt.index(recall.needles[-1]) / len(recall.prompt)


def recall_problems(
    cells: Sequence[Cell], num_items: int, first_seed: int = 0
) -> list[list[Problem]]:
    """The questions of each cell; seeds are counted up from the first."""
    seeds = range(first_seed, first_seed + num_items)
    return [
        [Problem(cell, seed, partial(make_item, cell, seed)) for seed in seeds] for cell in cells
    ]


def interleave(by_cell: Sequence[Sequence[Problem]]) -> Iterator[Problem]:
    """A question of each cell in turn: an interrupted run has all cells alike."""
    for row in zip_longest(*by_cell):
        yield from (problem for problem in row if problem is not None)
