# SPDX-License-Identifier: Apache-2.0
"""Scores of an answer between 0 and 1, as the benchmarks define them.

Every metric takes the generated text and the references. Sources: RULER (arXiv 2404.06654),
LongBench (arXiv 2308.14508), InfiniteBench (arXiv 2402.13718), SQuAD F1 (arXiv 1606.05250).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from .recall_tasks import first_line

Metric = Callable[[str, Sequence[str]], float]

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_line(text: str, references: Sequence[str]) -> float:
    """The first line is the reference."""
    return float(any(first_line(text) == reference.strip() for reference in references))


def match_all(text: str, references: Sequence[str]) -> float:
    """Share of the references that the text contains, whatever the case (RULER)."""
    lower = text.lower()
    return sum(reference.lower() in lower for reference in references) / len(references)


def match_any(text: str, references: Sequence[str]) -> float:
    """Whether the text contains one of the references (RULER's questions)."""
    lower = text.lower()
    return float(any(reference.lower() in lower for reference in references))


def token_f1(text: str, references: Sequence[str]) -> float:
    """Best F1 of normalised words over the references (SQuAD, LongBench)."""
    return max(_f1(_words(text), _words(reference)) for reference in references)


def right_number(text: str, references: Sequence[str]) -> float:
    """Share of the numbers in the text that are the reference (LongBench's counting)."""
    numbers = re.findall(r"\d+", text)
    if not numbers:
        return 0.0
    return sum(number == references[0] for number in numbers) / len(numbers)


def right_paragraph(text: str, references: Sequence[str]) -> float:
    """As `right_number`, of the reference "Paragraph N" (LongBench's retrieval)."""
    return right_number(text, re.findall(r"\d+", references[0])[:1])


def first_number(text: str, references: Sequence[str]) -> float:
    """The first number in the text is the reference (InfiniteBench's retrieval)."""
    found = re.search(r"\d+", text)
    return float(found is not None and found.group() == references[0])


def has_word(text: str, references: Sequence[str]) -> float:
    """The reference is a word of the text, without punctuation (InfiniteBench's key-value)."""
    words = re.split(r"[\s\"'.,:;{}\[\]()]+", text)
    return float(references[0] in words)


def _words(text: str) -> list[str]:
    plain = text.lower().translate(_PUNCTUATION)
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def _f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if common else 0.0
