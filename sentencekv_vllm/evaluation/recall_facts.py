# SPDX-License-Identifier: Apache-2.0
"""Facts to plant, questions about them and their answers."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from . import recall_words as words

TASKS: tuple[str, ...] = (
    "niah_single",
    "niah_multikey",
    "niah_multivalue",
    "niah_multiquery",
    "variable_tracking",
)
MULTI_TURN = "multi_turn"
"""Two questions in turn; not one of `TASKS`, which have one."""
SESSION = "multi_turn_session"
"""The same two questions within one request: `items.Item.forced`."""
ALL_TASKS: tuple[str, ...] = (*TASKS, MULTI_TURN, SESSION)


@dataclass(frozen=True)
class Span:
    """A stretch of text with one role.

    Roles: `answer` (restated words) and `value` (what can only come from the context).
    """

    text: str
    role: str


@dataclass(frozen=True)
class Fact:
    """One statement: `stem` + " " + `value` + "."; `stem` holds the key."""

    kind: str
    key: tuple[str, ...]
    stem: str
    value: str
    question: str

    @property
    def sentence(self) -> str:
        """The needle as planted in the haystack."""
        return f"{self.stem} {self.value}."


@dataclass
class Query:
    """A question, its answer and the needle sentences it relies on.

    `later` is the fact that a second question asks for, in a turn of its own.
    """

    task: str
    question: str
    answer: list[Span]
    needles: list[str]
    distractors: list[str] = field(default_factory=list)
    later: Fact | None = None

    @property
    def values(self) -> list[str]:
        """The values that a correct answer must contain, in order."""
        return [s.text.strip() for s in self.answer if s.role == "value"]


def is_test_pair(first: str, second: str) -> bool:
    """True when this key combination is held out for testing (about 1 in 6)."""
    return zlib.crc32(f"{first}|{second}".encode()) % 6 == 0


class FactSampler:
    """Draws facts whose keys are unique within one document.

    `split` is "train", "test" or "any"; it selects disjoint key combinations.
    """

    kinds = ("code", "locker", "place", "owner")

    def __init__(self, rng: random.Random, split: str = "train") -> None:
        if split not in ("train", "test", "any"):
            raise ValueError(f"unknown split {split!r}")
        self.rng = rng
        self.split = split
        self._used: set[tuple[str, ...]] = set()

    def _pair(self, first: Sequence[str], second: Sequence[str]) -> tuple[str, str]:
        while True:
            a, b = self.rng.choice(first), self.rng.choice(second)
            if self.split == "any" or is_test_pair(a, b) == (self.split == "test"):
                return a, b

    def value(self) -> str:
        """A random five-digit number or a random word-word pair."""
        if self.rng.random() < 0.6:
            return str(self.rng.randrange(10000, 100000))
        return f"{self.rng.choice(words.VALUE_WORDS)}-{self.rng.choice(words.VALUE_WORDS)}"

    def person(self) -> str:
        """A first name with a surname, from the sampler's split."""
        return " ".join(self._pair(words.FIRST_NAMES, words.SURNAMES))

    def fact(
        self,
        kind: str,
        like: Fact | None = None,
        attribute: str | None = None,
        person: str | None = None,
    ) -> Fact:
        """Draw a fact of `kind`; `like` makes it share part of that fact's key."""
        for _ in range(200):
            fact = self._draw(kind, like, attribute, person)
            if fact.key not in self._used:
                self._used.add(fact.key)
                return fact
        raise RuntimeError("ran out of unused keys")

    def _draw(
        self, kind: str, like: Fact | None, attribute: str | None, person: str | None
    ) -> Fact:
        rng = self.rng
        keep = rng.randrange(3) if like is not None else -1
        if kind == "code":
            attr = attribute or rng.choice(words.ATTRIBUTES)
            first: Sequence[str] = words.ADJECTIVES
            second: Sequence[str] = words.OBJECTS
            if like is not None:
                attr = like.key[1]
                first = (like.key[2],) if keep == 0 else first
                second = (like.key[3],) if keep == 1 else second
            a, b = self._pair(first, second)
            stem = f"The {attr} for the {a} {b} is"
            return Fact(
                kind, (kind, attr, a, b), stem, self.value(),
                f"What is the {attr} for the {a} {b}?",
            )  # fmt: skip
        if kind == "locker":
            if person is None:
                first, second = words.FIRST_NAMES, words.SURNAMES
                if like is not None:
                    first = (like.key[1],) if keep == 0 else first
                    second = (like.key[2],) if keep == 1 else second
                person = " ".join(self._pair(first, second))
            a, b = person.split()
            return Fact(
                kind, (kind, a, b), f"The locker number of {a} {b} is",
                str(rng.randrange(10000, 100000)),
                f"What is the locker number of {a} {b}?",
            )  # fmt: skip
        if kind == "place":
            first, second = words.COLOURS, words.OBJECTS
            name = rng.choice(words.FIRST_NAMES)
            if like is not None:
                name = like.key[1] if keep == 0 else name
                second = (like.key[3],) if keep == 1 else second
            a, b = self._pair(first, second)
            return Fact(
                kind, (kind, name, a, b), f"{name} keeps the {a} {b} in the",
                f"{rng.choice(words.ADJECTIVES)} {rng.choice(words.PLACES)}",
                f"Where does {name} keep the {a} {b}?",
            )  # fmt: skip
        if kind == "owner":
            first, second = words.ADJECTIVES, words.OBJECTS
            if like is not None:
                first = (like.key[1],) if keep == 0 else first
                second = (like.key[2],) if keep == 1 else second
            a, b = self._pair(first, second)
            return Fact(
                kind, (kind, a, b), f"The {a} {b} belongs to", person or self.person(),
                f"Who owns the {a} {b}?",
            )  # fmt: skip
        raise ValueError(f"unknown kind {kind!r}")


def _join(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def make_query(
    sampler: FactSampler,
    task: str,
    distractors: int = 4,
    count: int = 3,
    kind: str | None = None,
) -> Query:
    """Draw a question of `task`.

    `distractors` is the number of look-alike needles of `niah_multikey` (and
    of unrelated hop pairs of `variable_tracking`); `count` is the number of
    values or keys of `niah_multivalue` and `niah_multiquery`.
    """
    rng = sampler.rng
    if task in ("niah_single", "niah_multikey"):
        if kind is None:
            kind = rng.choice(("code", "code", "code", *FactSampler.kinds))
        fact = sampler.fact(kind)
        others = []
        if task == "niah_multikey":
            others = [sampler.fact(kind, like=fact).sentence for _ in range(distractors)]
        answer = [Span(fact.stem, "answer"), Span(f" {fact.value}", "value"), Span(".", "answer")]
        return Query(task, fact.question, answer, [fact.sentence], others)

    if task == MULTI_TURN:
        fact, later = sampler.fact("code"), sampler.fact("locker")
        answer = [Span(fact.stem, "answer"), Span(f" {fact.value}", "value"), Span(".", "answer")]
        needles = [fact.sentence, later.sentence]
        return Query(task, fact.question, answer, needles, later=later)

    if task == "niah_multivalue":
        fact = sampler.fact("code")
        attr, a, b = fact.key[1:]
        values = [fact.value]
        while len(values) < count:
            extra = sampler.value()
            if extra not in values:
                values.append(extra)
        answer = [Span(f"The {attr}s for the {a} {b} are", "answer")]
        for i, value in enumerate(values):
            if i:
                answer.append(Span(" and" if i == len(values) - 1 else ",", "answer"))
            answer.append(Span(f" {value}", "value"))
        answer.append(Span(".", "answer"))
        return Query(
            task, f"What are all the {attr}s for the {a} {b}?", answer,
            [f"{fact.stem} {v}." for v in values],
        )  # fmt: skip

    if task == "niah_multiquery":
        attr = rng.choice(words.ATTRIBUTES)
        facts = [sampler.fact("code", attribute=attr) for _ in range(count)]
        answer = []
        for i, fact in enumerate(facts):
            answer.append(Span((" " if i else "") + fact.stem, "answer"))
            answer.append(Span(f" {fact.value}", "value"))
            answer.append(Span(".", "answer"))
        names = _join([f"the {f.key[2]} {f.key[3]}" for f in facts])
        return Query(
            task, f"What are the {attr}s for {names}?", answer, [f.sentence for f in facts]
        )

    if task == "variable_tracking":
        pairs = []
        for _ in range(1 + distractors):
            locker = sampler.fact("locker")
            pairs.append((sampler.fact("owner", person=" ".join(locker.key[1:])), locker))
        owner, locker = pairs[0]
        answer = [
            Span(owner.stem, "answer"), Span(f" {owner.value}", "value"), Span(".", "answer"),
            Span(f" {locker.stem}", "answer"), Span(f" {locker.value}", "value"),
            Span(".", "answer"),
        ]  # fmt: skip
        return Query(
            task,
            f"What is the locker number of the owner of the {owner.key[1]} {owner.key[2]}?",
            answer, [owner.sentence, locker.sentence],
            [f.sentence for pair in pairs[1:] for f in pair],
        )  # fmt: skip
    raise ValueError(f"unknown task {task!r}; choose from {TASKS}")
