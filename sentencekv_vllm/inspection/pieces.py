# SPDX-License-Identifier: Apache-2.0
"""The text of spans of tokens."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

import numpy as np

from ..segmentation.base import TokenIds
from ..segmentation.vocabulary import Vocabulary


def pieces(vocabulary: Vocabulary, token_ids: TokenIds, ends: Iterable[int]) -> tuple[str, ...]:
    """Texts of the spans [ends[i - 1], ends[i]); joined they are the whole text.

    A character of several tokens belongs to the last of them.

    Args:
        ends: increasing, of `token_ids`, the last is their number.
    """
    text = vocabulary.text(token_ids)
    places = np.concatenate(([0], vocabulary.byte_ends(token_ids)))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    found, start = [], 0
    for end in ends:
        found.append(decoder.decode(text[places[start] : places[end]]))
        start = end
    return tuple(found)
