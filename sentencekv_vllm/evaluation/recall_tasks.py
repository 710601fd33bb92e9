# SPDX-License-Identifier: Apache-2.0
"""Synthetic long-context recall tasks: deterministic, dependency-free, tokenizer-agnostic.

A prompt is an English-like haystack of template sentences with needles (facts) planted in it,
and a question about them. Keys come from word lists, split into combinations that tiny-recall
was trained on and others; values are drawn at random for every item, so nothing can be
answered by memorising.

Five tasks:

niah_single: one needle in filler text, one question.
niah_multikey: one queried needle among look-alike needles that share part of its key
    (same attribute, same adjective or noun).
niah_multivalue: one key carrying several values; all are asked for.
niah_multiquery: several needles asked for in a single question.
variable_tracking: two hops, from object to owner to the owner's locker number.

A sixth, multi_turn, asks a second question after the first is answered, about a needle that
the first did not need; its item has `next_head` and `next_target`. multi_turn_session asks the
same questions about the same texts.

    item = make_prompt("niah_multikey", target_tokens=4096, seed=7,
                       count_tokens=lambda s: len(tok(s).input_ids))
    text = generate(item.prompt)  # greedy, stop at a newline
    ok = is_correct(text, item)

The expected continuation is a full sentence that restates the key before the
value ("The access code for the amber lantern is 48127."), so most of the recall
happens while decoding, not in the prefill.  `answer_prefix=True` moves that
restatement into the prompt (the style RULER uses).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .recall_facts import ALL_TASKS, MULTI_TURN, SESSION, TASKS, FactSampler, Query, make_query
from .recall_filler import filler_sentence

__all__ = [
    "ALL_TASKS",
    "MULTI_TURN",
    "SESSION",
    "TASKS",
    "RecallPrompt",
    "first_line",
    "is_correct",
    "make_prompt",
    "score",
]

QUESTION_PREFIX = "\n\nQuestion: "
ANSWER_PREFIX = "\nAnswer:"


@dataclass(frozen=True)
class RecallPrompt:
    """An evaluation item.

    `answers` are the values that the continuation must contain; `target` is
    the whole expected continuation; `needles` are the sentences it rests on.
    After the answer, `next_head` asks the second question of `MULTI_TURN`, whose
    continuation is `next_target`; both are empty otherwise.
    """

    task: str
    seed: int
    prompt: str
    answers: tuple[str, ...]
    target: str
    needles: tuple[str, ...]
    next_head: str = ""
    next_target: str = ""


def paragraphs(rng: random.Random, sentences: Sequence[str]) -> Iterator[str]:
    """Yield the sentences with the separator that precedes each of them."""
    left = 0
    for i, sentence in enumerate(sentences):
        if left == 0:
            left = rng.randrange(4, 10)
            yield sentence if i == 0 else f"\n\n{sentence}"
        else:
            yield f" {sentence}"
        left -= 1


def _word_count(text: str) -> int:
    return len(text.split())


def make_prompt(
    task: str,
    target_tokens: int,
    seed: int,
    count_tokens: Callable[[str], int] = _word_count,
    *,
    depth: float | None = None,
    distractors: int | None = None,
    count: int = 3,
    kind: str | None = None,
    answer_prefix: bool = False,
    long_sentences: bool = False,
    split: str = "test",
) -> RecallPrompt:
    """Build a prompt of at most `target_tokens` tokens (usually within 1 % of it).

    Args:
        task: one of `ALL_TASKS`.
        target_tokens: wanted prompt length in the unit of `count_tokens`.
        seed: fixes the whole item together with the other arguments.
        count_tokens: length of a text in tokens; the default counts words.
        depth: relative position of the (first) needle, 0 = start; random if None.
        distractors: look-alike needles; by default it grows with the length.
        count: number of values (multivalue) or keys (multiquery).
        kind: fact kind of the single and multikey tasks; random if None.
        answer_prefix: put the restated key at the end of the prompt, beyond `target_tokens`.
        long_sentences: three statements become one sentence (`join_sentences`).
        split: which key combinations to use: "test", "train" or "any".
    """
    if task == SESSION:
        task = MULTI_TURN
    rng = random.Random(f"{task}/{target_tokens}/{seed}/{split}")
    sampler = FactSampler(rng, split)
    if distractors is None:
        distractors = max(3, min(24, target_tokens // 128))
        if task == "variable_tracking":
            distractors = max(1, distractors // 4)
    query = make_query(sampler, task, distractors, count, kind)

    def ask(question: str, stem: str, answer: str) -> tuple[str, str]:
        head = f"{QUESTION_PREFIX}{question}{ANSWER_PREFIX}"
        cut = len(stem) + 1 if answer_prefix else 0
        return f"{head} {answer}"[: len(head) + cut], f" {answer}"[cut:]

    stem = query.answer[0].text
    head, target = ask(query.question, stem, "".join(s.text for s in query.answer))
    # Not `head`: with and without `answer_prefix` the text is the same.
    question = f"{QUESTION_PREFIX}{query.question}{ANSWER_PREFIX}"
    later = query.later
    next_turn = ask(later.question, later.stem, later.sentence) if later else ("", "")

    facts = [*query.needles, *query.distractors]
    used: float = count_tokens(question) + sum(count_tokens(f" {f}") for f in facts) + 2
    if used > target_tokens:
        raise ValueError(f"{task} needs at least {used} tokens, {target_tokens} asked for")
    filler: list[str] = []
    misses = 0
    while misses < 20:
        sentence = filler_sentence(rng)
        cost = count_tokens(f" {sentence}") + 0.2  # a share of the paragraph breaks
        if used + cost > target_tokens:
            misses += 1
            continue
        used += cost
        filler.append(sentence)

    places = sorted(rng.random() for _ in query.needles)
    if depth is not None:
        places = [depth + p * (1.0 - depth) * (i > 0) for i, p in enumerate(places)]
        places.sort()
    body = plant(rng, filler, query, places)
    while True:
        sentences = join_sentences(body) if long_sentences else body
        text = "".join(paragraphs(random.Random(seed), sentences))
        if count_tokens(text + question) <= target_tokens:
            break
        body.remove(next(s for s in body if s in filler))
    # Where the needles are in `text`: their last mark may be another one.
    needles = tuple(n.removesuffix(".") if long_sentences else n for n in query.needles)
    return RecallPrompt(task, seed, text + head, tuple(query.values), target, needles, *next_turn)


def join_sentences(sentences: Sequence[str], statements: int = 3) -> list[str]:
    """The same texts, most of them ended by a semicolon: `statements` make a sentence, but where a
    paragraph, a question or an exclamation ends it earlier."""
    last = len(sentences) - 1
    return [
        s[:-1] + ";" if i % statements < statements - 1 and i < last and s.endswith(".") else s
        for i, s in enumerate(sentences)
    ]


def plant(
    rng: random.Random, filler: Sequence[str], query: Query, places: Sequence[float]
) -> list[str]:
    """Filler with the needles at their places, 0 to 1, and distractors anywhere."""
    marks = [(p, s) for p, s in zip(places, query.needles, strict=True)]
    marks += [(rng.random(), s) for s in query.distractors]
    marks += [((i + 0.5) / max(1, len(filler)), s) for i, s in enumerate(filler)]
    return [s for _, s in sorted(marks, key=lambda m: m[0])]


def first_line(text: str) -> str:
    """The generated answer proper: the first non-empty line."""
    return text.strip().split("\n", 1)[0].strip()


def score(text: str, item: RecallPrompt) -> float:
    """Share of the expected values that the first generated line contains."""
    line = first_line(text)
    return sum(a in line for a in item.answers) / len(item.answers)


def is_correct(text: str, item: RecallPrompt) -> bool:
    """Exact match: the first generated line is the expected continuation."""
    return first_line(text) == item.target.strip()
