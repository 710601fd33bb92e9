# SPDX-License-Identifier: Apache-2.0
"""Sentence ends from a table of the token ids that carry a mark: about 15 ns a token."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .abbreviations import Abbreviations, TextBefore
from .base import Segmenter, TokenIds
from .lengths import Ends, SentenceLengths
from .marks import (
    ANY,
    CLOSERS,
    CLOSING,
    HARD,
    HARD_END,
    LINE_END,
    NEWLINES,
    SOFT,
    SOFT_END,
)
from .vocabulary import Vocabulary

# What the table says of a token.
_SOFT = 1  # carries a mark that ends a sentence before white space
_HARD = 2  # carries a mark that always ends one, or a newline
_DOT = 4  # the soft mark is a single full stop
_SPACED = 8  # white space follows the soft mark within the token
_SPACE = 16  # starts with white space
_CLOSING = 32  # marks and closing quotes or brackets only
_NEWLINE = 64  # has a newline
_BLANK = 128  # white space with a newline
_FRAGMENT = 256  # may be the last bytes of a mark or closer that is spread over tokens
_BROKEN = 512  # starts or ends within a character

_SPREAD = sorted(c.encode() for c in SOFT + HARD + CLOSERS + NEWLINES if not c.isascii())
_SPREAD_WIDTHS = {len(character) for character in _SPREAD}


class PunctuationSegmenter(Segmenter):
    """Ends sentences at marks and newlines.

    A sentence ends after a run of tokens: the one with the mark, then closing quotes, brackets,
    further marks and newlines. `.`, `!`, `?` and the ellipsis count only before white space or
    the end of the text, and a full stop not after an abbreviation (see `abbreviations.py`).
    Without `final`, a run is settled once the token after it is known.

    Attributes:
        boundary_tokens: [V] bool, the tokens after which a sentence may end.
    """

    name = "punctuation"

    def __init__(self, lengths: SentenceLengths, vocabulary: Vocabulary) -> None:
        super().__init__(lengths)
        self._table, mark_places = _classify(vocabulary)
        self._text_before = TextBefore(vocabulary, mark_places)
        self._abbreviations = Abbreviations(vocabulary)
        self._vocabulary = vocabulary
        self._spread = {width: _spread_characters(width) for width in _SPREAD_WIDTHS}
        self.boundary_tokens = (self._table[:-1] & (_SOFT | _HARD | _FRAGMENT)) != 0

    def marks(self, token_ids: TokenIds, final: bool) -> Ends:
        kinds = self._table.take(token_ids, mode="clip")
        self._mark_spread(token_ids, kinds)
        at = np.flatnonzero((kinds & (_SOFT | _HARD)) != 0)
        if at.size == 0:
            return np.empty(0, np.int32)
        end = _run_ends(kinds, at)
        last = end == kinds.size - 1
        kind = kinds[at]
        hard = (kind & _HARD) != 0
        after = kinds[np.minimum(end + 1, kinds.size - 1)]
        soft = np.flatnonzero(
            ~hard & ((kind & _SOFT) != 0) & (last | ((after & _SPACE) | (kind & _SPACED) != 0))
        )
        soft = soft[~self._abbreviated(token_ids, at[soft], kind[soft], final)]
        hard[soft] = True
        if not final:
            broken = (kinds[:-4:-1] & _BROKEN) != 0  # may yet make up a closing quote
            hard &= end + np.logical_and.accumulate(broken).sum() < kinds.size - 1
        ends: Ends = (end[hard] + 1).astype(np.int32)  # ascending, repeated within a run
        return np.compress(np.diff(ends, append=0) != 0, ends)

    def _mark_spread(self, token_ids: TokenIds, kinds: NDArray[np.uint16]) -> None:
        """Mark all tokens of a character that is spread over tokens as what the character is."""
        at = np.flatnonzero((kinds & _FRAGMENT) != 0)
        if at.size == 0:
            return
        before = self._text_before(token_ids, at).view("<u8")[:, 0]
        for width, (characters, character_kinds) in self._spread.items():
            character = before & np.uint64((1 << 8 * width) - 1)
            index = np.minimum(np.searchsorted(characters, character), characters.size - 1)
            found = np.flatnonzero(characters[index] == character)
            token, kind = at[found], character_kinds[index[found]]
            missing = np.full(token.size, width)
            for _ in range(width):
                kinds[token] |= kind
                missing -= self._vocabulary.widths(token_ids[token])
                token = token - (missing > 0)

    def _abbreviated(
        self,
        token_ids: TokenIds,
        at: NDArray[np.int64],
        kind: NDArray[np.uint16],
        final: bool,
    ) -> NDArray[np.bool_]:
        abbreviated = np.zeros(at.size, np.bool_)
        dot = np.flatnonzero(kind & _DOT)
        before = self._text_before(token_ids, at[dot])
        abbreviated[dot] = self._abbreviations(token_ids, at[dot], before, final)
        return abbreviated


def _run_ends(kinds: NDArray[np.uint16], at: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the last token of the run that each mark is in."""
    after = kinds[1:]
    # What closes a line that has ended opens the next one.
    runs_on = ((after & _BLANK) != 0) | (((after & _CLOSING) != 0) & ((kinds[:-1] & _NEWLINE) == 0))
    ends = np.append(~runs_on, True)
    ends_before = np.cumsum(ends, dtype=np.int32)[at] - ends[at]
    run_ends: NDArray[np.int64] = np.flatnonzero(ends)[ends_before]
    return run_ends


def _classify(vocabulary: Vocabulary) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """Return the table, and where in each piece the text before its mark ends: both [V + 1]."""
    pieces = vocabulary.pieces()
    table = np.zeros(len(pieces), np.uint16)
    places = np.zeros(len(pieces), np.int64)
    for token_id, piece in enumerate(pieces):
        text = piece.decode("utf-8", "replace")
        if "\ufffd" in text:
            table[token_id] = _BROKEN
        if text[:1].isspace():
            table[token_id] |= _SPACE
        if ANY.search(text):
            kind, place = _classify_text(text)
            table[token_id] |= kind
            places[token_id] = place
        elif piece and any(character.endswith(piece) for character in _SPREAD):
            table[token_id] |= _FRAGMENT
            places[token_id] = len(piece)
    return table, places


def _classify_text(text: str) -> tuple[int, int]:
    """Return what the table says of a piece, and the byte at which its soft mark starts."""
    kind, place = 0, 0
    if LINE_END.search(text):
        kind |= _HARD | _NEWLINE | (_BLANK if text.isspace() else 0)
    elif CLOSING.fullmatch(text):
        kind |= _CLOSING
    if HARD_END.search(text):
        kind |= _HARD
    soft = SOFT_END.search(text)
    if soft:
        place = len(text[: soft.start()].encode())
        single = soft[0].startswith(".") and not soft[0].startswith("..")
        kind |= _SOFT | (_DOT if single else 0) | (_SPACED if soft[1] else 0)
    return kind, place


def _spread_characters(width: int) -> tuple[NDArray[np.uint64], NDArray[np.uint16]]:
    """Return the marks and closers of `width` bytes, packed and sorted, and what they are."""
    characters = [character for character in _SPREAD if len(character) == width]
    packed = [int.from_bytes(character, "big") for character in characters]
    kinds = [_classify_text(character.decode())[0] for character in characters]
    return np.array(packed, np.uint64), np.array(kinds, np.uint16)
