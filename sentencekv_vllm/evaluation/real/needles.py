# SPDX-License-Identifier: Apache-2.0
"""RULER's needles and variable tracking (arXiv 2404.06654) in a haystack of real prose."""

from __future__ import annotations

import random
import string
from itertools import pairwise, permutations

from ..items import Item
from .maker import Maker, Turn

# Tokens. RULER lets needles go on for 128: several values may come as a list with their keys. The
# prompt ends with the answer's first words, so a single value comes at once.
SINGLE_REPLY, REPLY = 24, 128
TRACKING_REPLY = 30  # as RULER has it
HOPS = 3

# Any two make a key; the values are random, so nothing can be answered by heart.
_WORDS = (
    "anchor apple basket bishop cactus candle copper cradle dagger dragon eagle engine falcon "
    "feather garnet glacier hammer harbor island jacket kettle ladder lantern magnet marble "
    "meadow needle onion orchard parcel pepper quarry ribbon river rocket saddle sailor stone "
    "timber tunnel turtle umbrella valley velvet violet walnut window yellow zephyr"
)

_HEAD = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n"
)


def needle(rng: random.Random) -> tuple[str, Turn]:
    """A sentence to plant, and the question about it."""
    key, number = "-".join(rng.sample(_WORDS.split(), 2)), str(rng.randrange(10**6, 10**7))
    turn = Turn(
        ask=f"\n\nWhat is the special magic number for {key} mentioned in the document?",
        prefix=f"The special magic number for {key} mentioned in the document is",
        wanted=(number,),
        max_tokens=SINGLE_REPLY,
    )
    return f"One of the special magic numbers for {key} is: {number}.", turn


def needles(rng: random.Random, maker: Maker, keys: int, values: int, asked: int) -> Item:
    """Numbers by key.

    Args:
        rng: of this item.
        maker: of prompts.
        keys: needles with a key of their own, the asked ones among them.
        values: numbers of each key, a needle each.
        asked: keys that the question names.
    """
    names = rng.sample([f"{a}-{b}" for a, b in permutations(_WORDS.split(), 2)], keys)
    numbers = {name: [str(rng.randrange(10**6, 10**7)) for _ in range(values)] for name in names}
    planted = [
        f"One of the special magic numbers for {name} is: {number}."
        for name in names
        for number in numbers[name]
    ]
    rng.shuffle(planted)
    wanted = rng.sample(names, asked)
    key = wanted[0] if asked == 1 else f"{', '.join(wanted[:-1])}, and {wanted[-1]}"
    many = values * asked > 1
    what = "special magic numbers" if many else "special magic number"
    be = "are" if many else "is"
    which = "all the" if many else "the"
    answers = tuple(number for name in wanted for number in numbers[name])
    turn = Turn(
        ask=f"\nWhat {be} {which} {what} for {key} mentioned in the provided text?",
        prefix=f"The {what} for {key} mentioned in the provided text {be}",
        wanted=answers,
        max_tokens=REPLY if many else SINGLE_REPLY,
        target="" if many else f" {answers[0]}.",
    )
    text = maker.haystack(rng, planted, maker.room(_HEAD, turn))
    return maker.item(_HEAD, text, [turn])


def variable_tracking(rng: random.Random, maker: Maker) -> Item:
    """Two chains of assignments; the variables of one are asked for."""
    letters = string.ascii_uppercase
    names = rng.sample([a + b + c for a in letters for b in letters for c in letters], 2 * HOPS + 2)
    chains = names[: HOPS + 1], names[HOPS + 1 :]
    values = rng.sample(range(10000, 100000), 2)
    lines = [
        [f"VAR {chain[0]} = {value}.", *(f"VAR {b} = VAR {a}." for a, b in pairwise(chain))]
        for chain, value in zip(chains, values, strict=True)
    ]
    order = [0] * (HOPS + 1) + [1] * (HOPS + 1)
    rng.shuffle(order)
    rest = [iter(chain) for chain in lines]
    head = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
    value = values[0]
    turn = Turn(
        ask=f"\nQuestion: Find all variables that are assigned the value {value} in the text "
        "above.",
        prefix="According to the chain(s) of variable assignment in the text above, "
        f"{HOPS + 1} variables are assigned the value {value}, they are:",
        wanted=tuple(chains[0]),
        max_tokens=TRACKING_REPLY,
    )
    text = maker.haystack(rng, [next(rest[i]) for i in order], maker.room(head, turn))
    return maker.item(head, text, [turn])
