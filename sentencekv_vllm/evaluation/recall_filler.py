# SPDX-License-Identifier: Apache-2.0
"""Haystack sentences of the recall tasks."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from . import recall_words as words

_SLOTS: dict[str, Sequence[str]] = {
    "adj": words.ADJECTIVES,
    "col": words.COLOURS,
    "obj": words.OBJECTS,
    "place": words.PLACES,
    "name": words.FIRST_NAMES,
    "sur": words.SURNAMES,
    "prof": words.PROFESSIONS,
    "event": words.EVENTS,
    "time": words.TIMES,
    "adv": words.ADVERBS,
    "verb": words.VERBS,
    "say": words.VERBS_SAY,
    "go": words.VERBS_GO,
    "weather": words.WEATHER,
    "food": words.FOODS,
    "unit": words.UNITS,
    "title": ("Dr.", "Mr.", "Mrs.", "Prof."),
    "num": tuple(str(n) for n in range(2, 100)),
    "dec": tuple(f"{n / 10:.1f}" for n in range(11, 100) if n % 10),
    "year": tuple(str(n) for n in range(1890, 2020)),
    "vague": ("nobody", "everyone", "someone", "the whole family", "a stranger"),
}

_FILLER_TEMPLATES: tuple[str, ...] = (
    "The {adj} {prof} {verb} the {col} {obj}.",
    "{name} {go} to the {place} {time}.",
    "It was a {adj} {event}.",
    "{name} {sur} {adv} {verb} the {obj}.",
    "There was {weather} over the {place} {time}.",
    "Was the {obj} really so {adj}?",
    "What a {adj} {place}!",
    "{vague} {say} that the {event} would begin {time}.",
    "The {prof} and the {prof} {go} past the {adj} {place} {time}.",
    "{title} {sur} {verb} a {col} {obj} near the {place}.",
    "{title} {sur} {say} that the {adj} {obj} was {dec} {unit} away.",
    "The {event} in the {place} lasted {num} {unit}.",
    "In {year} the {place} was {adj} and the {event} was {adj} too.",
    "{name} wanted {food}, but the {prof} had only {food} and {food}.",
    "The {col} {obj} cost {dec} coins at the {adj} market.",
    "When the {weather} came, the {prof} {verb} the {obj} and {go} to the {place}.",
    "{name} {say} that {name} had {verb} the {adj} {obj} {time}, although {vague} agreed.",
    "Why did {name} {sur} leave the {place} {time}?",
    "Because of the {weather}, the {event} was moved from the {place} to the {adj} {place}.",
    "The {adj} {obj} stood beside the {col} {obj}, and the {prof} {adv} {verb} them both.",
    "{name} and {name} shared some {food} {time}.",
    "After the {event}, the {adj} {prof} {go} home with a {obj}, a {obj} and a {col} {obj}.",
    "Nothing in the {place} was as {adj} as the {col} {obj} of {title} {sur}.",
    "{vague} {adv} {verb} the {obj}.",
    "The weather in the {place} was {adj}, with {weather} and {weather} {time}.",
    "About {num} visitors came to the {event}, and {num} of them {verb} a {obj}.",
    "If the {prof} {say} so, then the {place} must be {adj}!",
    "{name} {sur}, a {adj} {prof} from the {place}, {verb} {num} {unit} of {food} {time}.",
    "Did {vague} see the {col} {obj} in the {place}?",
    "A {adj} {obj} is better than a {adj} {obj}.",
    "The {prof} {say} that every {adj} {place} needs a {adj} {obj}, a {col} {obj} and at"
    " least {num} {unit} of {weather} before the {event} can begin.",
    "Far from the {place}, where the {weather} was {adj} and the {food} was {adj}, a {prof}"
    " {adv} {verb} the {obj} that {name} {sur} had {verb} {time}.",
    "Hurry up!",
    "The {place} was closed {time}.",
    "{title} {sur} was {adj}, {adj} and {adj}.",
    "They {go} about {dec} miles {time}, and then the {adj} {event} began.",
)


def _compile(template: str) -> list[str | Sequence[str]]:
    parts: list[str | Sequence[str]] = []
    for i, piece in enumerate(re.split(r"\{(\w+)\}", template)):
        if i % 2:
            parts.append(_SLOTS[piece])
        elif piece:
            parts.append(piece)
    return parts


_FILLER = [_compile(t) for t in _FILLER_TEMPLATES]


def filler_sentence(rng: random.Random) -> str:
    """Return one random haystack sentence (about 2 to 35 words)."""
    rand = rng.random
    parts = _FILLER[int(rand() * len(_FILLER))]
    text = "".join([p if isinstance(p, str) else p[int(rand() * len(p))] for p in parts])
    return text[0].upper() + text[1:]
