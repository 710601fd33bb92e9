# SPDX-License-Identifier: Apache-2.0
"""What every segmenter does: token ids in, sentence ends out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from .lengths import Ends, SentenceLengths

TokenIds = NDArray[np.int32]


class Segmenter(ABC):
    """Finds where sentences may end; their lengths are then fitted to the bounds."""

    name: ClassVar[str]

    def __init__(self, lengths: SentenceLengths) -> None:
        self.lengths = lengths

    @abstractmethod
    def marks(self, token_ids: TokenIds, final: bool) -> Ends:
        """Return the places where a sentence may end.

        Args:
            token_ids: [n] int32.
            final: nothing follows. Without it, a place is returned only if no text that may
                follow changes it; the result is then a prefix of that for the longer text.

        Returns:
            [m] int32, strictly increasing, in 1..n.
        """

    def split(self, token_ids: TokenIds, final: bool = True) -> Ends:
        """Return the ends of the sentences of a text.

        Args:
            token_ids: [n] int32.
            final: the text is complete, and the last end is n. Without it the open tail is
                left out: only sentences that no further token changes are returned.

        Returns:
            [m] int32, strictly increasing exclusive ends; empty for an empty text.
        """
        return self.lengths.fit(self.marks(token_ids, final), len(token_ids), final)
