# SPDX-License-Identifier: Apache-2.0
"""Repeating real text word for word: a function of a file, paragraphs of a document."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..items import Item
from .files import RealTextError
from .functions import Function
from .maker import BREAK, Maker, Turn, join

FENCE = "```python\n"
LINES = 6  # of a function that are looked for
LINE_CHARACTERS = 12  # of such a line, at least: `return x` is anywhere
SPARE = 8  # tokens
FIRST_WORDS = 6  # of a paragraph, which name it
PIECE_WORDS = 5  # of a string that is looked for
PARAGRAPH_TOKENS = range(30, 110)


def repeat_code(rng: random.Random, maker: Maker) -> Item:
    """One of the functions that follow one another in real files.

    Raises:
        RealTextError: no function fits.
    """
    pool = maker.functions()
    head = f"Here is a Python file.\n{FENCE}"
    start = rng.randrange(len(pool))
    # The longest question: names differ.
    room = maker.room(head, _repeat(max(pool, key=lambda f: len(f.name)), maker)) - 2 * SPARE
    chosen: list[Function] = []
    for i in range(len(pool)):
        function = pool[(start + i) % len(pool)]
        room -= maker.count(f"{function.source}{BREAK}")
        if room < 0:
            break
        chosen.append(function)
    fit = [f for f in chosen if len(_lines(f)) >= LINES // 2]
    if not fit:
        raise RealTextError(f"no function fits a prompt of {maker.tokens} tokens: ask for longer")
    text = BREAK.join(function.source for function in chosen)
    return maker.item(head, text, [_repeat(rng.choice(fit), maker)])


def _repeat(function: Function, maker: Maker) -> Turn:
    first, _, rest = function.source.partition("\n")
    wanted = _lines(function)
    needed = rest[: rest.rindex(wanted[-1]) + len(wanted[-1])] if wanted else rest
    return Turn(
        ask=f"\n```\nRepeat the function `{function.name}` from the file above, exactly as it is.",
        prefix=f"{FENCE}{first}\n",
        wanted=wanted,
        max_tokens=maker.count(needed) + SPARE,
        target=needed,
    )


def _lines(function: Function) -> tuple[str, ...]:
    lines = [line.strip() for line in function.source.split("\n")[1:]]
    return tuple(line for line in lines if len(line) > LINE_CHARACTERS)[:LINES]


def quotes(rng: random.Random, maker: Maker, turns: int, session: bool) -> Item:
    """Paragraphs of one document, a turn each; the last is scored.

    Args:
        rng: of this item.
        maker: of prompts.
        turns: questions.
        session: in one request, the earlier turns answered by force; else two in two requests.

    Raises:
        RealTextError: the document has fewer paragraphs of that size.
    """
    head = "Read the following document. I will ask you to quote from it.\n\n"
    room = maker.room(head, quote("word " * 2 * FIRST_WORDS, maker)) - 2 * SPARE
    # From elsewhere, if a stretch has too few paragraphs of that size.
    for _ in range(50):
        document = [" ".join(paragraph) for paragraph in maker.stretch(rng, room)]
        fit = quotable(document, maker)
        if len(fit) >= turns:
            break
    else:
        raise RealTextError(
            f"a document of {maker.tokens} tokens has fewer than {turns} paragraphs of "
            f"{PARAGRAPH_TOKENS.start} to {PARAGRAPH_TOKENS.stop} tokens: ask for longer contexts"
        )
    asked = [quote(text, maker) for text in rng.sample(fit, turns)]
    return maker.item(head, join([[text] for text in document]), asked, session=session)


def quotable(document: Sequence[str], maker: Maker) -> list[str]:
    """The paragraphs that fit a reply and that their first words name; not the last, which may be
    cut."""
    starts = [" ".join(text.split()[:FIRST_WORDS]) for text in document]
    return [
        text
        for text, start in zip(document[:-1], starts, strict=False)
        if maker.count(text) in PARAGRAPH_TOKENS and starts.count(start) == 1
    ]


def quote(paragraph: str, maker: Maker) -> Turn:
    """Ask for a paragraph word for word."""
    words = paragraph.split()
    first, rest = words[:FIRST_WORDS], words[FIRST_WORDS:]
    pieces = [rest[i : i + PIECE_WORDS] for i in range(0, len(rest), PIECE_WORDS)]
    start = " ".join(first)
    target = f" {' '.join(rest)}"
    return Turn(
        ask=f'\n\nQuote the paragraph that begins with "{start}", word for word.',
        prefix=start,
        wanted=tuple(" ".join(piece) for piece in pieces),
        max_tokens=maker.count(target) + SPARE,
        target=target,
    )
