# SPDX-License-Identifier: Apache-2.0
"""Long continuations that are decoded by force: perplexity, and distance from dense by length."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from .items import TEXT, Cell, Item, Problem
from .recall_facts import FactSampler, Query
from .recall_filler import filler_sentence
from .recall_tasks import ANSWER_PREFIX, QUESTION_PREFIX, paragraphs, plant
from .scores import exact_line

CONTINUATION = 256  # tokens at least, whole sentences
QUESTION_TOKENS = 40  # at most, of the first question, which is in the prompt
TEXT_FILES = (".txt", ".md", ".rst", ".py")
CountTokens = Callable[[str], int]


class TextTooShort(ValueError):
    """A text ends before prompt and continuation do; the message says where."""


def long_filler(tokens: int, seed: int, count_tokens: CountTokens) -> Item:
    """Template sentences that go on after a prompt of them."""
    rng = random.Random(f"long_filler/{tokens}/{seed}")
    sentences, used = [], 0
    while used < tokens + 2 * CONTINUATION:
        sentences.append(filler_sentence(rng))
        used += count_tokens(f" {sentences[-1]}")
    pieces = list(paragraphs(random.Random(seed), sentences))
    return _split(pieces, tokens, count_tokens)


def long_answers(tokens: int, seed: int, count_tokens: CountTokens) -> Item:
    """Question after question about facts of the prompt, each answered by a sentence of it."""
    rng = random.Random(f"long_answers/{tokens}/{seed}")
    sampler = FactSampler(rng, "test")
    facts, turns, length = [], [], 0
    while length < CONTINUATION + QUESTION_TOKENS:
        fact = sampler.fact(rng.choice(FactSampler.kinds))
        facts.append(fact)
        turns.append(f"{QUESTION_PREFIX}{fact.question}{ANSWER_PREFIX} {fact.sentence}")
        length += count_tokens(turns[-1])
    first, whole = turns[0], "".join(turns)
    head = first[: first.index(ANSWER_PREFIX) + len(ANSWER_PREFIX)]
    needles = [fact.sentence for fact in facts]
    room = tokens - count_tokens(head) - sum(count_tokens(f" {n}") + 0.2 for n in needles)
    filler = []
    while True:
        sentence = filler_sentence(rng)
        room -= count_tokens(f" {sentence}") + 0.2
        if room < 0:
            break
        filler.append(sentence)
    places = [rng.random() for _ in needles]
    body = plant(rng, filler, Query("long_answers", "", [], needles), places)
    text = "".join(paragraphs(random.Random(seed), body))
    return _item(text + head, whole.removeprefix(head))


TEXT_TASKS: dict[str, Callable[[int, int, CountTokens], Item]] = {
    "long_filler": long_filler,
    "long_answers": long_answers,
}


def text_problems(
    tasks: Sequence[str], lengths: Sequence[int], num_items: int, first_seed: int = 0
) -> list[list[Problem]]:
    """Of `TEXT_TASKS`, a cell for each task and length."""
    seeds = range(first_seed, first_seed + num_items)

    def maker(task: str, tokens: int, seed: int) -> Callable[[CountTokens], Item]:
        return lambda count_tokens: TEXT_TASKS[task](tokens - 1, seed, count_tokens)

    return [
        [Problem(Cell(t, TEXT, n), seed, maker(t, n, seed)) for seed in seeds]
        for n in lengths
        for t in tasks
    ]


def file_problems(path: Path, lengths: list[int], num_items: int) -> list[list[Problem]]:
    """Stretches of a text file, or of all texts of a folder, a cell for each prompt length.

    Stretch i of n begins at word i / n of the text, so that stretches of a long text do not
    overlap.
    """
    words = words_of(read_texts(path))

    def maker(tokens: int, seed: int) -> Callable[[CountTokens], Item]:
        start = len(words) * seed // num_items
        return lambda count_tokens: stretch(words, start, tokens, count_tokens)

    return [
        [
            Problem(Cell(f"text/{path.stem}", TEXT, n), seed, maker(n, seed))
            for seed in range(num_items)
        ]
        for n in lengths
    ]


def read_texts(path: Path) -> str:
    """A file; of a folder, the files of `TEXT_FILES` below it in the order of their paths."""
    if path.is_file():
        return path.read_text(encoding="utf-8")
    files = [f for f in sorted(path.rglob("*")) if f.suffix in TEXT_FILES and f.is_file()]
    return "\n\n".join(f.read_text(encoding="utf-8", errors="replace") for f in files)


def words_of(text: str) -> list[str]:
    """Each with the white space before it."""
    return re.findall(r"\s*\S+", text)


def stretch(words: Sequence[str], start: int, tokens: int, count_tokens: CountTokens) -> Item:
    """A prompt of at most `tokens`, begin-of-text token included, and what follows it.

    Raises:
        TextTooShort: it ends before.
    """
    return _split(words[start : start + tokens + CONTINUATION], tokens - 1, count_tokens)


def _split(pieces: Sequence[str], tokens: int, count_tokens: CountTokens) -> Item:
    """The pieces that fill a prompt, and those that follow."""
    sizes = [count_tokens(piece) for piece in pieces]
    cut, used = 0, 0
    while cut < len(pieces) and used + sizes[cut] <= tokens:
        used += sizes[cut]
        cut += 1
    end, length = cut, 0
    while end < len(pieces) and length < CONTINUATION:
        length += sizes[end]
        end += 1
    if length < CONTINUATION:
        raise TextTooShort(
            f"a prompt of {tokens} tokens and {CONTINUATION} more need a longer text: it ends "
            f"after {used + length}"
        )
    return _item("".join(pieces[:cut]).lstrip(), "".join(pieces[cut:end]))


def _item(prompt: str, continuation: str) -> Item:
    return Item(prompt, (), exact_line, max_tokens=0, continuation=continuation)
