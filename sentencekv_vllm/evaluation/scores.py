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
from difflib import SequenceMatcher

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


def rouge_l(text: str, references: Sequence[str]) -> float:
    """Best ROUGE-L F1 over the references: longest common subsequence of words (Lin, 2004)."""
    found = text.split()
    return max(_lcs_f1(found, reference.split()) for reference in references)


def any_number_last(text: str, references: Sequence[str]) -> float:
    """The last number in the text is the reference (InfiniteBench's code_run)."""
    numbers = re.findall(r"-?\d+", text)
    return float(bool(numbers) and numbers[-1] == references[0])


def right_letter(text: str, references: Sequence[str]) -> float:
    """The choice that the text names is the reference, a letter from A to D (LongBench v2)."""
    found = re.search(r"answer is \(?([A-D])\)?", text) or re.search(r"\b([A-D])\b", text)
    return float(found is not None and found[1] == references[0])


def code_similarity(text: str, references: Sequence[str]) -> float:
    """Similarity of the first line of code to the reference (LongBench's code tasks).

    By `difflib`, which is within a few hundredths of the edit similarity that the authors use.
    """
    lines = (line for line in text.lstrip("\n").split("\n") if not re.search(r"`|#|//", line))
    line = next(lines, "")
    return max(SequenceMatcher(None, line, reference).ratio() for reference in references)


def right_class(classes: Sequence[str]) -> Metric:
    """Whether the text names the right class, shared with the others that it names (LongBench)."""

    def score(text: str, references: Sequence[str]) -> float:
        named = [name for name in classes if name in text]
        whole = [n for n in named if not any(n in other and n != other for other in named)]
        return 1 / len(whole) if references[0] in whole else 0.0

    return score


def _lcs_f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    row = [0] * (len(wanted) + 1)
    for word in found:
        above = 0
        for i, other in enumerate(wanted, 1):
            above, row[i] = row[i], above + 1 if word == other else max(row[i], row[i - 1])
    return 2 * row[-1] / (len(found) + len(wanted)) if row[-1] else 0.0


def _words(text: str) -> list[str]:
    plain = text.lower().translate(_PUNCTUATION)
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def _f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if common else 0.0
