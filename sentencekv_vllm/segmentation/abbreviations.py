# SPDX-License-Identifier: Apache-2.0
"""Full stops that do not end a sentence: after abbreviations, initials and list numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .base import TokenIds
from .vocabulary import Vocabulary

# At most seven letters: a word is looked at through the eight bytes before its full stop.
ABBREVIATIONS = (
    "mr mrs ms mx dr prof sr jr st rev hon gen col lt sgt capt cpt cmdr maj gov sen rep pres "
    "messrs mme mlle etc eg ie vs cf viz al approx resp incl excl inc ltd co corp llc dept univ "
    "assn bros ave blvd rd mt ft jan feb mar apr jun jul aug sep sept oct nov dec"
)
# Abbreviations before a number, words elsewhere: "No. 5", but "He said no. Then he left."
NUMBERED = "no nos nr fig figs tab eq eqs p pp vol vols ch sec art"

_WINDOW = 8  # bytes
_byte = np.arange(256)
_UPPER = (_byte >= ord("A")) & (_byte <= ord("Z"))
_LETTER = _UPPER | ((_byte >= ord("a")) & (_byte <= ord("z")))
_DIGIT = (_byte >= ord("0")) & (_byte <= ord("9"))
_WORD = _LETTER | _DIGIT | (_byte == ord(".")) | (_byte >= 0x80)
_LOWER = np.where(_UPPER, _byte + 32, _byte).astype(np.uint8)
_FIRST_BYTES = np.array([(1 << 8 * length) - 1 for length in range(_WINDOW)], "<u8")
_NOTHING_VISIBLE, _DIGIT_VISIBLE, _OTHER_VISIBLE = range(3)


class TextBefore:
    """The eight bytes of text before a place within a token, read from the tokens before it.

    Args:
        vocabulary: the pieces.
        places: [V + 1], offset in bytes within each token's piece.
    """

    def __init__(self, vocabulary: Vocabulary, places: NDArray[np.int64]) -> None:
        starts = vocabulary.offsets[:-1]
        self._tails = _last_bytes(vocabulary.blob, starts, vocabulary.offsets[1:])
        self._heads = _last_bytes(vocabulary.blob, starts, starts + places)

    def __call__(self, token_ids: TokenIds, at: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return [m, 8] uint8 for the m token positions `at`, nearest byte first, 0 beyond."""
        heads, tails = self._heads, self._tails
        window = heads[0].take(token_ids[at], mode="clip")
        filled = heads[1].take(token_ids[at], mode="clip")
        # Short words have few tokens: what one letter a token does not reach is not looked at.
        for step in range(1, _WINDOW + 1):
            more = np.flatnonzero((filled < _WINDOW) & (at >= step))
            if more.size == 0:
                break
            token = token_ids[at[more] - step]
            window[more] |= tails[0].take(token, mode="clip") << (8 * filled[more])
            filled[more] += tails[1].take(token, mode="clip")
        return window.view(np.uint8).reshape(-1, _WINDOW)


class Abbreviations:
    """Tells which full stops belong to an abbreviation, an initial or the number of a list."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        pieces = (piece.lstrip()[:1] for piece in vocabulary.pieces())
        self._visible = np.array(
            [
                _NOTHING_VISIBLE if not c else _DIGIT_VISIBLE if c.isdigit() else _OTHER_VISIBLE
                for c in pieces
            ],
            np.uint8,
        )
        self._plain = _packed(ABBREVIATIONS)
        self._numbered = _packed(NUMBERED)

    def __call__(
        self, token_ids: TokenIds, at: NDArray[np.int64], before: NDArray[np.uint8], final: bool
    ) -> NDArray[np.bool_]:
        """Return [m] bool for the full stops of the tokens at `at`, sorted, with text `before`.

        Without `final`, one that may turn out to be an abbreviation is taken for one.
        """
        # A word that fills the window counts as empty: no abbreviation is as long.
        length = _WORD.take(before).argmin(1)
        word = _LOWER.take(before).view("<u8")[:, 0] & _FIRST_BYTES[length]
        last, second, third = before[:, 0], before[:, 1], before[:, 2]
        initial = (length == 1) & _UPPER[last]
        dotted = _LETTER[last] & (second == ord(".")) & _WORD[third]  # U.S.  e.g.
        listed = _DIGIT[last]
        digits = np.flatnonzero(listed)
        beyond = before[digits, length[digits]]
        listed[digits] = (_DIGIT.take(before[digits]).argmin(1) == length[digits]) & (
            (beyond == 0) | (beyond == ord("\n"))
        )
        numbered = np.flatnonzero(_contains(self._numbered, word))
        found: NDArray[np.bool_] = _contains(self._plain, word) | initial | dotted | listed
        found[numbered] |= self._number_follows(token_ids, at[numbered], final)
        return found

    def _number_follows(
        self, token_ids: TokenIds, at: NDArray[np.int64], final: bool
    ) -> NDArray[np.bool_]:
        """Look for a digit in the next two tokens; the first may be no more than a space."""
        result = np.zeros(len(at), np.bool_)
        undecided = ~result
        for step in (1, 2):
            within = at + step < len(token_ids)
            token = token_ids[np.minimum(at + step, len(token_ids) - 1)]
            visible = self._visible.take(token, mode="clip")
            result |= undecided & np.where(within, visible == _DIGIT_VISIBLE, not final)
            undecided &= within & (visible == _NOTHING_VISIBLE)
        return result


def _last_bytes(
    blob: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Pack the last eight bytes of each range, the last one lowest; also return how many."""
    places = ends[:, None] - 1 - np.arange(_WINDOW)
    valid = places >= starts[:, None]
    padded = np.append(blob, np.uint8(0))
    last = np.where(valid, padded[np.where(valid, places, -1)], 0).astype(np.uint8)
    return np.ascontiguousarray(last).view("<u8")[:, 0], valid.sum(1).astype(np.uint64)


def _packed(words: str) -> NDArray[np.uint64]:
    return np.sort(np.array([int.from_bytes(w.encode(), "big") for w in words.split()], "<u8"))


def _contains(words: NDArray[np.uint64], word: NDArray[np.uint64]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = words.take(np.searchsorted(words, word), mode="clip") == word
    return found
