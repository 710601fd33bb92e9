# SPDX-License-Identifier: Apache-2.0
"""From a document and questions about it to an item of a wanted length."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..items import CountTokens, Item
from ..scores import match_all
from .chat import Chat
from .files import RealTextError
from .functions import Function
from .prose import Paragraph

SPARE = 4  # tokens: where words meet, a tokenizer may count otherwise
BREAK = "\n\n"


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        ask: the user's words.
        prefix: first words of the reply, which stand in the prompt (RULER).
        wanted: strings that a right reply contains.
        target: the right reply after `prefix`, where it is known word for word.
        max_tokens: of the reply.
    """

    ask: str
    prefix: str
    wanted: tuple[str, ...]
    max_tokens: int
    target: str = ""


@dataclass(frozen=True)
class Maker:
    """What the tasks are made of.

    Attributes:
        chat: the model's template.
        tokens: longest prompt, begin-of-text token included.
        count: length of a text.
        prose, functions: where documents come from; loaded when they are asked for.
    """

    chat: Chat
    tokens: int
    count: CountTokens
    prose: Callable[[], Sequence[Paragraph]]
    functions: Callable[[], Sequence[Function]]

    def room(self, head: str, turn: Turn) -> int:
        """Tokens left for the document.

        Raises:
            RealTextError: the prompt is too short for the question.
        """
        around = self.chat.open(head + turn.ask) + turn.prefix
        left = self.tokens - 1 - SPARE - self.count(around)
        if left < 1:
            raise RealTextError(
                f"the question alone takes {self.tokens - left} tokens, --contexts has "
                f"{self.tokens}: ask for longer contexts"
            )
        return left

    def item(
        self, head: str, document: str, turns: Sequence[Turn], *, session: bool = False
    ) -> Item:
        """Ask the turns about a document; the last is scored.

        Args:
            head: what the user says before the document.
            document: its text.
            turns: one or more. With more than one, `prefix` and `target` of all but the last are
                known.
            session: all in one request, the earlier turns answered by force; else two turns in
                two requests.
        """
        first, last = turns[0], turns[-1]
        prompt = self.chat.open(f"{head}{document}{first.ask}") + first.prefix
        later = [self.chat.go_on(turn.ask.lstrip()) + turn.prefix for turn in turns[1:]]
        forced = "".join(t.target + n for t, n in zip(turns, later, strict=False))
        needle = last.wanted[0] if len(turns) == 1 and len(last.wanted) == 1 else ""
        place = document.find(needle) if needle else -1
        return Item(
            prompt=prompt,
            references=last.wanted,
            metric=match_all,
            max_tokens=max(turn.max_tokens for turn in turns),
            target=last.target if session or len(turns) == 1 else "",
            next_head="" if session else "".join(later),
            forced=forced if session else "",
            depth=place / len(document) if place >= 0 else None,
        )

    def stretch(self, rng: random.Random, room: int) -> list[Paragraph]:
        """Paragraphs that follow one another, from a random one on.

        Raises:
            RealTextError: there are not as many.
        """
        pool = self.prose()
        start, found = rng.randrange(len(pool)), list[Paragraph]()
        for i in range(len(pool)):
            paragraph = pool[(start + i) % len(pool)]
            taken = list[str]()
            for sentence in paragraph:
                room -= self.count(f"{' ' if taken else BREAK}{sentence}")
                if room < 0:
                    break
                taken.append(sentence)
            found += [tuple(taken)] if taken else []
            if room < 0:
                return found
        raise RealTextError(
            f"the text is {room} tokens too short for a prompt of {self.tokens}: name a folder "
            "with more of it with --text-folder"
        )

    def haystack(self, rng: random.Random, needles: Sequence[str], room: int) -> str:
        """A stretch with the needles, in their order, between its sentences.

        Raises:
            RealTextError: fewer sentences than needles.
        """
        # One more: the sentence after it has a space before it, and no break.
        room -= sum(self.count(f" {needle}") + 1 for needle in needles)
        paragraphs = [list(paragraph) for paragraph in self.stretch(rng, room)]
        gaps = [(p, s) for p, text in enumerate(paragraphs) for s in range(len(text) + (p > 0))]
        if len(gaps) < len(needles):
            raise RealTextError(
                f"{len(needles)} needles do not fit a prompt of {self.tokens} tokens: ask for "
                "longer contexts"
            )
        places = sorted(rng.sample(gaps, len(needles)))
        for (p, s), needle in reversed(list(zip(places, needles, strict=True))):
            paragraphs[p].insert(s, needle)
        return join(paragraphs)


def join(paragraphs: Sequence[Sequence[str]]) -> str:
    """A text of paragraphs."""
    return BREAK.join(" ".join(sentences) for sentences in paragraphs)
