# SPDX-License-Identifier: Apache-2.0
"""How long a run will take, before it starts."""

from __future__ import annotations

from collections.abc import Sequence

from .items import Problem
from .variant import Variant

# Measured with tiny-recall, one thread of an x86 server core with AVX-512.
PREFILL_SECONDS_PER_TOKEN = 4e-5
PREFILL_SECONDS_PER_PAIR = 1.1e-8  # of tokens: attention grows with the square
ANSWER_SECONDS = 0.05  # decode of one short answer
DISTANCE_SECONDS = 0.15  # the same once more, forced, with all distributions
START_SECONDS = 20.0


def seconds(problems: Sequence[Problem], variants: Sequence[Variant], with_kl: bool) -> float:
    """Of one engine; styles of a question share their prefill."""
    texts = {(p.cell.task, p.cell.tokens, p.seed) for p in problems}
    prefill = sum(
        PREFILL_SECONDS_PER_TOKEN * tokens + PREFILL_SECONDS_PER_PAIR * tokens**2
        for _, tokens, _ in texts
    )
    answer = ANSWER_SECONDS + DISTANCE_SECONDS * with_kl
    return prefill + answer * len(problems) * len(variants)


def estimate(
    problems: Sequence[Problem], variants: Sequence[Variant], with_kl: bool, processes: int
) -> str:
    """A line to print."""
    expected = START_SECONDS + seconds(problems, variants, with_kl) / processes
    return (
        f"{len(problems)} questions in {len(variants)} variants: about {expected / 60:.0f} min on "
        f"{processes} free CPU core{'s' if processes > 1 else ''} with tiny-recall; other models "
        "and prompts from files are not estimated"
    )
