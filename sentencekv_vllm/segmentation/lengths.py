# SPDX-License-Identifier: Apache-2.0
"""The bounds on a sentence's length, and how sentences are joined and cut to meet them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ends = NDArray[np.int32]


@dataclass(frozen=True)
class SentenceLengths:
    """Least and greatest number of tokens in a sentence."""

    min_tokens: int
    max_tokens: int

    def __post_init__(self) -> None:
        if self.min_tokens < 1:
            raise ValueError(
                f"min_sentence_tokens must be at least 1, got {self.min_tokens}: set it to 1"
            )
        # A sentence one token over the maximum is cut in two: both halves must be long enough.
        if 2 * self.min_tokens > self.max_tokens + 1:
            raise ValueError(
                "min_sentence_tokens must not exceed half of max_sentence_tokens, got "
                f"{self.min_tokens} and {self.max_tokens}: set max_sentence_tokens to at least "
                f"{2 * self.min_tokens - 1}"
            )

    def fit(self, marks: Ends, num_tokens: int, final: bool) -> Ends:
        """Turn the places where a sentence may end into the ends of the sentences.

        Args:
            marks: [m], strictly increasing, in 1..num_tokens.
            num_tokens: length of the text.
            final: the text is complete, so what follows the last mark is a sentence. A last
                sentence that is too short joins the one before, unless that takes a cut
                more; it then stays short. Without `final` the open tail is left out, except
                that every `max_tokens` tokens of it are a sentence already.

        Returns:
            [n] int32, strictly increasing exclusive ends.
        """
        ends = self._join(marks)
        last = int(ends[-1]) if ends.size else 0
        tail = num_tokens - last
        if final and tail > 0:
            ends = np.append(ends, num_tokens)
            if tail < self.min_tokens and ends.size > 1:
                start = int(ends[-3]) if ends.size > 2 else 0
                if self._pieces(num_tokens - start) == self._pieces(last - start):
                    ends = np.delete(ends, -2)
        elif tail >= self.max_tokens:
            full = np.arange(1, tail // self.max_tokens + 1) * self.max_tokens
            ends = np.append(ends, last + full)
        return self._cut(ends.astype(np.int32, copy=False))

    def _pieces(self, length: int) -> int:
        return -(-length // self.max_tokens)

    def _join(self, marks: Ends) -> Ends:
        """Keep each mark that lies at least `min_tokens` after the last one kept."""
        at = np.concatenate([[0], marks])
        # A sentence that is long enough by itself ends there, whatever was joined before it.
        kept = np.append(np.diff(at, prepend=-self.min_tokens) >= self.min_tokens, False)
        if kept[:-1].all():
            return marks
        # What follows a kept mark is a chain of hops; doubling the hop finds all chains at
        # once, in as many rounds as the longest one has binary digits.
        hop = np.append(np.searchsorted(at, at + self.min_tokens), at.size)
        while True:
            reached = hop[np.flatnonzero(kept)]
            if kept[reached].all():
                joined: Ends = marks[kept[1:-1]]
                return joined
            kept[reached] = True
            hop = hop[hop]

    def _cut(self, ends: Ends) -> Ends:
        """Cut what is longer than `max_tokens` into the fewest, most equal pieces."""
        lengths = np.diff(ends, prepend=0)
        if lengths.size == 0 or lengths.max() <= self.max_tokens:
            return ends
        pieces = -(-lengths // self.max_tokens)
        owner = np.repeat(np.arange(ends.size), pieces)
        nth = np.arange(owner.size) - (np.cumsum(pieces) - pieces)[owner] + 1
        start, length = (ends - lengths)[owner], lengths[owner].astype(np.int64)
        cut: Ends = start + nth * length // pieces[owner]
        return cut.astype(np.int32)
