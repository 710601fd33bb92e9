# SPDX-License-Identifier: Apache-2.0
"""Sentences of equal length: for models without a tokenizer, and as the plainest baseline."""

from __future__ import annotations

import numpy as np

from .base import Segmenter, TokenIds
from .lengths import Ends, SentenceLengths


class FixedSegmenter(Segmenter):
    """Ends a sentence every `fixed_length` tokens."""

    name = "fixed"

    def __init__(self, lengths: SentenceLengths, fixed_length: int) -> None:
        if not lengths.min_tokens <= fixed_length <= lengths.max_tokens:
            raise ValueError(
                "fixed_sentence_tokens must lie between min_sentence_tokens and "
                f"max_sentence_tokens, got {fixed_length} for {lengths.min_tokens} to "
                f"{lengths.max_tokens}: set it to "
                f"{min(max(fixed_length, lengths.min_tokens), lengths.max_tokens)}"
            )
        super().__init__(lengths)
        self.fixed_length = fixed_length

    def marks(self, token_ids: TokenIds, final: bool) -> Ends:
        return np.arange(self.fixed_length, len(token_ids) + 1, self.fixed_length, dtype=np.int32)
