# SPDX-License-Identifier: Apache-2.0
"""What the KV of a model and the index of a ranking weigh."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ..host_format import host_format
from ..types import IndexKind


@dataclass(frozen=True)
class KVShape:
    """Of one KV head."""

    head_dim: int
    block_size: int  # tokens
    element_bytes: int = 2

    @classmethod
    def of_model(cls, folder: Path, block_size: int) -> Self | None:
        """From its `config.json`, with a KV cache of 16 bits; None where there is none."""
        path = folder / "config.json"
        if not path.exists():
            return None
        config = json.loads(path.read_text())
        head_dim = config.get("head_dim")
        return cls(head_dim or config["hidden_size"] // config["num_attention_heads"], block_size)

    @property
    def token_bytes(self) -> int:
        """K and V of one token."""
        return 2 * self.head_dim * self.element_bytes

    @property
    def head_block_bytes(self) -> int:
        """K and V of one block."""
        return self.block_size * self.token_bytes

    def swapped_bytes(self, host_kv_dtype: str) -> int:
        """Of one block, as a swap pool of this precision keeps and moves it."""
        form = host_format(host_kv_dtype, self.block_size, self.head_dim, self.element_bytes)
        return self.head_block_bytes if form is None else form.head_block_bytes

    def index_bytes(
        self,
        index: IndexKind | None,
        tokens_per_row: float,
        code_share: float = 0.5,
        code_bits: int = 2,
    ) -> float:
        """Per token, of the part of the index that a ranking reads.

        Args:
            index: None where nothing is ranked.
            tokens_per_row: mean length of the sentences, which share a row each.
            code_share: of the channels, that have a code.
            code_bits: of a channel.
        """
        if index is None or index is IndexKind.RANDOM:
            return 0.0
        if index is IndexKind.TOKEN_CODES:
            channels = max(8, int(code_share * self.head_dim) // 8 * 8)
            # A code with its scale; mean, scale and flag of the block.
            return code_bits * channels / 8 + 2 + (self.head_dim + 5) / self.block_size
        if not tokens_per_row:
            return math.nan
        return index.vectors * 2 * self.head_dim / tokens_per_row  # bfloat16
