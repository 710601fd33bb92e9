# SPDX-License-Identifier: Apache-2.0
"""ChunkKV: the prompt's last tokens decide once, for chunks of neighbouring tokens."""

from __future__ import annotations

from ..types import Fate, Settlement
from .base import SelectionPolicy

CHUNK_KV = SelectionPolicy(
    name="chunkkv",
    index=None,
    grouping="blocks",
    settlement=Settlement(Fate.COMPACT, window=32, kernel=1, unit=16),
)
"""Chunks of 16 tokens to which the observation window pays the most attention, by KV head; the
rest is dropped for ever.

Paper: ChunkKV (arXiv 2502.00299), Algorithm 1: attention of the observation window, summed over
the tokens of a chunk. A chunk keeps what follows the token that was looked at: a value behind its
key, which votes for single tokens (`snapkv`) drop.

Differences from the paper: chunks of 16 tokens, half a KV block, where the paper has 10; layers
share no indices (`windowkv` does that).
"""
