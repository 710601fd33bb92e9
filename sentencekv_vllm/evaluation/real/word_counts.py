# SPDX-License-Identifier: Apache-2.0
"""RULER's aggregation over a whole prompt (arXiv 2404.06654): common words, frequent words."""

from __future__ import annotations

import math
import random
import re
import string
from functools import lru_cache
from itertools import count

from ..items import Item
from .files import RealTextError
from .maker import Maker, Turn
from .prose import Paragraph

COMMON = 10  # words to be found
MOST = 30  # times that each of them appears, in prompts that have the room
OFTEN = 10  # times as often as a word that is not to be found
ENTRY_TOKENS = 6  # of a numbered word, about
CODED_LETTERS = 6
NOISE = "...."
COMMON_REPLY, FREQUENT_REPLY = 120, 50  # tokens, as RULER has it


def common_words(rng: random.Random, maker: Maker) -> Item:
    """A numbered list of words of the prose; ten of them appear ten times as often as others."""
    head = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    known = vocabulary(tuple(maker.prose()))
    words = rng.sample(known, len(known))
    wanted, others = words[:COMMON], words[COMMON:]
    turn = Turn(
        ask=f"\nQuestion: What are the {COMMON} most common words in the above list?",
        prefix=f"The top {COMMON} words that appear most often in the list are:",
        wanted=tuple(wanted),
        max_tokens=COMMON_REPLY,
    )
    room = maker.room(head, turn)
    # Half of the prompt at most are the words to be found.
    often = max(4, min(MOST, room // (2 * ENTRY_TOKENS * COMMON)))
    seldom = max(1, often // OFTEN)
    listed = wanted * often
    number = count(1)
    for word in listed:
        room -= maker.count(f" {next(number)}. {word}")
    for word in others:
        room -= sum(maker.count(f" {next(number)}. {word}") for _ in range(seldom))
        if room < 0:
            break
        listed += [word] * seldom
    if len(listed) == often * COMMON:
        raise RealTextError(
            f"{len(listed)} words do not fit a prompt of {maker.tokens} tokens: ask for longer "
            "contexts"
        )
    rng.shuffle(listed)
    text = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    return maker.item(head, text, [turn])


def frequent_words(rng: random.Random, maker: Maker) -> Item:
    """Made-up words whose counts fall with the square of their rank; the first one is noise."""
    head = (
        "Read the following coded text and track the frequency of each coded word. Find the three "
        "most frequently appeared coded words. "
    )
    words: list[str] = []
    while len(words) < 100:
        word = "".join(rng.choices(string.ascii_lowercase, k=CODED_LETTERS))
        words += [word] if word not in words else []
    turn = Turn(
        ask="\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are "
        "the three most frequently appeared words in the above coded text?",
        prefix="According to the coded text above, the three most frequently appeared words are:",
        wanted=tuple(words[:3]),
        max_tokens=FREQUENT_REPLY,
    )
    room = maker.room(head, turn)
    ranked = [NOISE, *words]
    shares = [6 / math.pi**2 / rank**2 for rank in range(1, len(ranked) + 1)]  # zeta(2) = pi^2 / 6
    sizes = [maker.count(f" {word}") for word in ranked]
    total = room / sum(share * size for share, size in zip(shares, sizes, strict=True))
    listed = [w for w, share in zip(ranked, shares, strict=True) for _ in range(int(total * share))]
    rng.shuffle(listed)
    return maker.item(head, " ".join(listed), [turn])


@lru_cache(maxsize=2)
def vocabulary(paragraphs: tuple[Paragraph, ...]) -> tuple[str, ...]:
    """Lower-case words of four to nine letters, none of which begins another."""
    text = " ".join(sentence for paragraph in paragraphs for sentence in paragraph)
    found = sorted(set(re.findall(r"\b[a-z]{4,9}\b", text)))
    # "word" would be found in a reply that says "words".
    return tuple(a for a, b in zip(found, [*found[1:], ""], strict=True) if not b.startswith(a))
