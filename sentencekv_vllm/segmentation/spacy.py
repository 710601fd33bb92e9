# SPDX-License-Identifier: Apache-2.0
"""Sentence ends from spaCy's rule-based sentencizer. No model is downloaded.

About 6 us a token, with the interpreter lock held: runs in a process of its own, see
`spacy_process.py`. What a prompt may take is bounded: by what spaCy is given to read
(`spacy_text.py`), and, since nobody knows all that it does, by CPU time.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import numpy as np
import spacy
from numpy.typing import NDArray

from .base import Segmenter, TokenIds
from .lengths import Ends, SentenceLengths
from .marks import HARD_END, LINE_END
from .spacy_text import readable, settled_end
from .vocabulary import Vocabulary

SECONDS, SECONDS_A_TOKEN = 3.0, 180e-6  # of CPU time: some thirty times what prose takes


class TooMuchWork(RuntimeError):
    """A text takes spaCy far longer than its length lets expect."""


_SURROGATES = re.compile("[\udc80-\udcff]")


class SpacySegmenter(Segmenter):
    """Ends sentences where spaCy does, at newlines, and at CJK marks, which "en" leaves out.

    Opening brackets and quotes, and full stops of abbreviations, are put right afterwards.

    Args:
        lengths: bounds on the sentences.
        vocabulary: the pieces that make up the text.
        chunk_chars: spaCy sees this much text at once; longer texts are cut between
            sentences, or, where there are none, at white space.

    Raises:
        TooMuchWork: by `marks` and `split`, where a text takes more CPU time than its share.
    """

    name = "spacy"

    def __init__(
        self, lengths: SentenceLengths, vocabulary: Vocabulary, chunk_chars: int = 20_000
    ) -> None:
        super().__init__(lengths)
        self._vocabulary = vocabulary
        self._chunk_chars = chunk_chars
        self._give_up_at = 0.0  # by time.process_time()
        self._nlp = spacy.blank("en")
        self._nlp.add_pipe("sentencizer")
        self._nlp.max_length = max(self._nlp.max_length, chunk_chars)

    def marks(self, token_ids: TokenIds, final: bool) -> Ends:
        self._give_up_at = time.process_time() + SECONDS + SECONDS_A_TOKEN * len(token_ids)
        text, widths = _decode(self._vocabulary.text(token_ids))
        if not final:
            # The last word may go on, and with it change where the last sentence ends.
            text = next(iter(text.rsplit(None, 1)[:-1]), "")
        ends = self._text_ends(text)
        if not final:
            ends = ends[:-1]
        # The token with the last character of a sentence is the last one of that sentence.
        byte_ends = np.cumsum(widths)[ends - 1]
        tokens = np.searchsorted(self._vocabulary.byte_ends(token_ids), byte_ends) + 1
        return np.unique(tokens).astype(np.int32)

    def _text_ends(self, text: str) -> NDArray[np.int64]:
        """Return where sentences end in the text, in characters, in ascending order."""
        lines = [match.span() for match in LINE_END.finditer(text)]
        settled = (settled_end(text, end) for end in self._spacy_ends(readable(text)))
        ends = {end for end in settled if end} - {start for start, _ in lines}
        ends |= {end for _, end in lines}
        ends |= {match.end() for match in HARD_END.finditer(text)}
        return np.array(sorted(ends), np.int64)

    def _spacy_ends(self, text: str) -> Iterator[int]:
        start = 0
        while start < len(text):
            if time.process_time() > self._give_up_at:
                raise TooMuchWork(f"{start} of {len(text)} characters done")
            chunk = text[start : start + self._chunk_chars]
            whole = start + len(chunk) == len(text)
            with self._nlp.memory_zone():
                ends = [sentence.end_char for sentence in self._nlp(chunk).sents]
            if not whole and len(ends) > 1:
                ends.pop()  # the chunk may have cut it
            elif not whole:
                ends = [max(chunk.rfind(" "), chunk.rfind("\n")) + 1 or len(chunk)]
            yield from (start + end for end in ends)
            start += len(chunk) if whole else ends[-1]


def _decode(raw: bytes) -> tuple[str, NDArray[np.int64]]:
    """Return the text and the bytes of each character. Bytes that are no UTF-8 become U+FFFD."""
    text = raw.decode("utf-8", "surrogateescape")
    if text.isascii():
        return text, np.ones(len(text), np.int64)
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    widths[(points >= 0xDC80) & (points <= 0xDCFF)] = 1
    return _SURROGATES.sub("\ufffd", text), widths
