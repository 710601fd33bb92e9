# SPDX-License-Identifier: Apache-2.0
"""Segmentation as the scheduler uses it: submit a prompt, poll for its sentence ends."""

from __future__ import annotations

import importlib.util
import logging
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .base import Segmenter, TokenIds
from .fixed import FixedSegmenter
from .lengths import Ends, SentenceLengths
from .punctuation import PunctuationSegmenter
from .spacy_process import SpacyJob, SpacyProcess
from .vocabulary import Vocabulary

logger = logging.getLogger(__name__)

SEGMENTERS = ("auto", "spacy", "punctuation", "fixed")


@dataclass
class _Pending:
    token_ids: TokenIds
    job: SpacyJob


class SegmentationService:
    """Finds the sentences of each request's prompt once, without holding up the caller.

    Who answers a prompt is settled by the setting and by the prompt, never by the load: the same
    prompt has the same sentences, whatever else is served.

    Args:
        segmenter: "auto" (the punctuation table; without a tokenizer, fixed lengths), "spacy",
            "punctuation" or "fixed".
        vocabulary: the pieces of the model's tokenizer; None if it has none.
        min_sentence_tokens: shorter sentences join the following one.
        max_sentence_tokens: longer sentences are cut.
        fixed_length: tokens in a sentence of the fixed segmenter.

    Attributes:
        boundary_tokens: [V] bool, the token ids after which a sentence may end; None if
            sentences end by length alone.
        stats: prompts by the segmenter that answered ("spacy", "punctuation", "fixed"), and
            those where the table stood in for spaCy, by reason ("spacy_failed": it raised, died
            or took more than its share on that prompt; "spacy_late": `wait` gave up).

    Raises:
        ValueError: unknown segmenter, one that needs a tokenizer without one, spaCy missing, or
            impossible lengths.
    """

    def __init__(
        self,
        segmenter: str,
        vocabulary: Vocabulary | None,
        *,
        min_sentence_tokens: int,
        max_sentence_tokens: int,
        fixed_length: int,
    ) -> None:
        if segmenter not in SEGMENTERS:
            raise ValueError(f"segmenter must be one of {', '.join(SEGMENTERS)}, got {segmenter!r}")
        if vocabulary is None and segmenter in ("spacy", "punctuation"):
            raise ValueError(
                f"segmenter {segmenter!r} reads the text of the prompt and needs a tokenizer, but "
                "the model has none that can be read: set segmenter to 'fixed'"
            )
        lengths = SentenceLengths(min_sentence_tokens, max_sentence_tokens)
        self.stats: Counter[str] = Counter()
        self.boundary_tokens: NDArray[np.bool_] | None = None
        self._spacy: SpacyProcess | None = None
        self._pending: dict[str, _Pending] = {}
        self._ends: dict[str, Ends] = {}
        self._said: set[str] = set()
        self._table: Segmenter
        if vocabulary is None or segmenter == "fixed":
            self._table = FixedSegmenter(lengths, fixed_length)
            if segmenter == "auto":
                self._say("no tokenizer: sentences are %d tokens each", fixed_length)
            return
        self._table = PunctuationSegmenter(lengths, vocabulary)
        self.boundary_tokens = self._table.boundary_tokens
        if segmenter != "spacy":
            return
        if importlib.util.find_spec("spacy") is None:
            raise ValueError(
                "segmenter 'spacy' needs the package spacy, which is not installed: "
                "pip install spacy, or set segmenter to 'punctuation'"
            )
        self._spacy = SpacyProcess(lengths, vocabulary)

    def warm_up(self) -> None:
        """Start spaCy now, where it is used: its import takes some 2 s."""
        if self._spacy is not None:
            self._spacy.submit(np.empty(0, np.int32))

    def submit(self, request_id: str, token_ids: TokenIds) -> None:
        """Begin with a prompt. Takes about 10 ns a token if the table answers, else a few us.

        Args:
            request_id: not submitted before, or dropped since.
            token_ids: [n] int32, not to be changed until the answer is there.
        """
        if request_id in self._pending or request_id in self._ends:
            raise ValueError(f"request {request_id!r} was submitted before: drop it first")
        if self._spacy is None:
            self._answer(request_id, token_ids)
        else:
            self._pending[request_id] = _Pending(token_ids, self._spacy.submit(token_ids))

    def poll(self, request_id: str, urgent: bool = False) -> Ends | None:
        """Return the prompt's sentence ends, or None as long as spaCy takes.

        Args:
            urgent: the prefill is over, so that waiting costs dense decode steps: the prompt goes
                before those that are still being prefilled.

        Raises:
            KeyError: the request was not submitted.
        """
        pending = self._pending.get(request_id)
        if pending is None:
            return self._ends[request_id]
        if not pending.job.done.is_set():
            pending.job.urgent |= urgent
            return None
        del self._pending[request_id]
        if pending.job.ends is None:
            return self._stand_in(request_id, pending.token_ids, "spacy_failed")
        self._ends[request_id] = pending.job.ends
        self.stats["spacy"] += 1
        return pending.job.ends

    def wait(self, request_id: str, timeout_s: float) -> Ends:
        """Return the prompt's sentence ends; the table's if spaCy is not done in time."""
        pending = self._pending.get(request_id)
        if pending is not None:
            pending.job.done.wait(timeout_s)
        ends = self.poll(request_id)
        if ends is None:
            assert pending is not None
            self.drop(request_id)
            ends = self._stand_in(request_id, pending.token_ids, "spacy_late")
        return ends

    def drop(self, request_id: str) -> None:
        """Forget a request, whether it was submitted or not."""
        self._ends.pop(request_id, None)
        pending = self._pending.pop(request_id, None)
        if pending is not None:
            pending.job.cancelled = True

    def split_tail(self, token_ids: TokenIds, final: bool = False) -> Ends:
        """Return the ends of the sentences that generated tokens have completed.

        A sentence is complete once the token after it is known: worth a call one token after
        a boundary token, and when the open sentence reaches its greatest length.

        Args:
            token_ids: [n] int32, the open sentence: what follows the last known end.
            final: nothing follows.
        """
        return self._table.split(token_ids, final)

    def is_boundary(self, token_id: int) -> bool:
        """Tell whether a sentence may end after this token."""
        table = self.boundary_tokens
        return table is not None and token_id < len(table) and bool(table[token_id])

    @property
    def spacy_pid(self) -> int | None:
        """Process id of the spaCy process while it runs."""
        return self._spacy.pid if self._spacy is not None else None

    def close(self) -> None:
        """End the spaCy process. Pending requests are answered by the table when polled."""
        if self._spacy is not None:
            self._spacy.close()

    def _answer(self, request_id: str, token_ids: TokenIds) -> Ends:
        self.stats[self._table.name] += 1
        self._ends[request_id] = self._table.split(token_ids)
        return self._ends[request_id]

    def _stand_in(self, request_id: str, token_ids: TokenIds, reason: str) -> Ends:
        """The table answers this prompt; the next one is spaCy's again."""
        self.stats[reason] += 1
        self._say("%s: the punctuation table answered such a prompt (said once)", reason)
        return self._answer(request_id, token_ids)

    def _say(self, message: str, *arguments: object) -> None:
        text = message % arguments
        if text not in self._said:
            self._said.add(text)
            logger.warning(text)
