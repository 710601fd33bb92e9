# SPDX-License-Identifier: Apache-2.0
"""What spaCy is given to read, and which of its ends are taken: bounded work, and no sentence
that ends with what opens the next one or with an abbreviation."""

from __future__ import annotations

import re

from .abbreviations import ABBREVIATIONS, NUMBERED
from .marks import OPENERS

# spaCy takes marks and symbols off a word one by one and looks at all of the rest each time: a
# run without white space costs the square of its length.
MOST_SYMBOLS = 8  # in a row; what is before them is not looked at
LONGEST_WORD = 64
_KEPT = 24  # characters of a longer one at its start, and at its end
_SYMBOLS = re.compile(rf"(?:[^\w\s]|_)+(?=(?:[^\w\s]|_){{{MOST_SYMBOLS}}})")
_LONG = re.compile(rf"(?<=\S{{{_KEPT}}})\S{{{LONGEST_WORD + 1 - 2 * _KEPT},}}(?=\S{{{_KEPT}}})")
_WORDS = "x" * 31 + " "

_LOOK_BACK = 16  # characters before an end
_OPENING = re.compile(rf"\s+[{re.escape(OPENERS)}]+$")
_ABBREVIATION = re.compile(rf"\b(?:{'|'.join(ABBREVIATIONS.split())})\.$", re.IGNORECASE)
_BEFORE_NUMBER = re.compile(rf"\b(?:{'|'.join(NUMBERED.split())})\.$", re.IGNORECASE)
_NUMBER = re.compile(r"\s*\d")


def readable(text: str) -> str:
    """The text, of the same length, with the inside of long runs written as plain words.

    Sentences end at the end of such a run or not at all. Runs of symbols keep their last eight,
    words their first and last 24 characters.
    """
    text = _SYMBOLS.sub(lambda run: "x" * len(run[0]), text)
    return _LONG.sub(lambda run: _plain(len(run[0])), text)


def _plain(length: int) -> str:
    """Words of x that join what is before and after them."""
    words = (_WORDS * (length // len(_WORDS) + 1))[:length]
    return f"{words[:-1]}x"


def settled_end(text: str, end: int) -> int | None:
    """Where a sentence ends that spaCy ends at `end`; None: it goes on there.

    An opening bracket or quote belongs to the next sentence, although spaCy counts it as one of
    the marks that follow a full stop. Abbreviations are those of the punctuation table.
    """
    before = text[max(0, end - _LOOK_BACK) : end]
    if end < len(text) and not text[end].isspace() and (opening := _OPENING.search(before)):
        end -= len(opening[0])
        before = before[: opening.start()]
    if end < len(text):
        if _ABBREVIATION.search(before):
            return None
        if _BEFORE_NUMBER.search(before) and _NUMBER.match(text, end):
            return None
    return end
