# SPDX-License-Identifier: Apache-2.0
"""The family of tasks `real`: names, and the problems that a command line asks for."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from ..items import TEXT, Cell, CountTokens, Item, Problem
from ..long_texts import CONTINUATION, stretch, words_of
from .chat import chat_of
from .functions import functions, python_files
from .maker import Maker, join
from .needles import needles, variable_tracking
from .prose import prose
from .quotes import quotes, repeat_code
from .word_counts import common_words, frequent_words

FAMILY = "real"
CHAT = "chat"
"""Style of cells whose prompts are in the model's chat template."""

SESSION_TASK = "real/multi_turn_session"
"""Decodes by force what ends a reply, which a server leaves out of its text."""

QUESTIONS: dict[str, Callable[[random.Random, Maker], Item]] = {
    "real/niah_single": partial(needles, keys=1, values=1, asked=1),
    "real/niah_multikey": partial(needles, keys=8, values=1, asked=1),
    "real/niah_multivalue": partial(needles, keys=1, values=4, asked=1),
    "real/niah_multiquery": partial(needles, keys=8, values=1, asked=3),
    "real/variable_tracking": variable_tracking,
    "real/common_words": common_words,
    "real/frequent_words": frequent_words,
    "real/repeat_code": repeat_code,
    "real/multi_turn": partial(quotes, turns=2, session=False),
    SESSION_TASK: partial(quotes, turns=3, session=True),
}
"""What `FAMILY` stands for."""

TEXTS = ("real/prose", "real/code")
"""Long texts to be decoded by force, without questions."""

REAL_TASKS = (*QUESTIONS, *TEXTS)


@dataclass(frozen=True)
class Sources:
    """Whose words the questions are about, and who is asked.

    Attributes:
        model: folder or name whose chat template is used.
        text_folder, code_folder: None: what the machine has.
    """

    model: str
    text_folder: str | None = None
    code_folder: str | None = None

    def digest(self) -> str:
        """Of all texts that a question may be made of."""
        found = hashlib.sha256()
        for paragraph in prose(self.text_folder):
            found.update(" ".join(paragraph).encode())
        for source in python_files(self.code_folder):
            found.update(source.encode())
        return found.hexdigest()[:12]

    def maker(self, tokens: int, count: CountTokens) -> Maker:
        """Of prompts of one length."""
        return Maker(
            chat_of(self.model),
            tokens,
            count,
            partial(prose, self.text_folder),
            partial(functions, self.code_folder),
        )


def real_problems(
    sources: Sources,
    tasks: Sequence[str],
    lengths: Sequence[int],
    num_items: int,
    first_seed: int = 0,
) -> list[list[Problem]]:
    """A cell for each task of `REAL_TASKS` and length.

    Raises:
        RealTextError: a folder has nothing for the tasks.
    """
    made = []
    seeds = range(first_seed, first_seed + num_items)
    for tokens in lengths:
        for task in tasks:
            style = TEXT if task in TEXTS else CHAT
            make = _make_text if task in TEXTS else _make_question
            made.append(
                [
                    Problem(
                        Cell(task, style, tokens), seed, partial(make, sources, task, tokens, seed)
                    )
                    for seed in seeds
                ]
            )
    return made


def _make_question(sources: Sources, task: str, tokens: int, seed: int, count: CountTokens) -> Item:
    rng = random.Random(f"{task}/{tokens}/{seed}")
    return QUESTIONS[task](rng, sources.maker(tokens, count))


def _make_text(sources: Sources, task: str, tokens: int, seed: int, count: CountTokens) -> Item:
    """From a random word of all the texts on."""
    words = _words(sources, task)
    rng = random.Random(f"{task}/{tokens}/{seed}")
    # A word has a token at least: from there on is enough, if there is as much.
    start = rng.randrange(max(1, len(words) - tokens - CONTINUATION))
    return stretch(words, start, tokens, count)


@lru_cache(maxsize=2)
def _words(sources: Sources, task: str) -> list[str]:
    if task == "real/code":
        return words_of("\n\n".join(python_files(sources.code_folder)))
    return words_of(join(prose(sources.text_folder)))
