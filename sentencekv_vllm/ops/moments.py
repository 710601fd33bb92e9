# SPDX-License-Identifier: Apache-2.0
"""Second moments of a layer's keys and queries: what its basis is balanced by."""

from __future__ import annotations

import torch
from torch import Tensor

from .basis import Axes, balanced_axes

SKIPPED = 64
"""First tokens of a text that do not count: attention sinks have keys unlike all others."""


def counted(num_tokens: int, block_size: int) -> range:
    """The tokens of a text that count: whole blocks behind the skipped ones."""
    return range(-(-SKIPPED // block_size) * block_size, num_tokens // block_size * block_size)


class Moments:
    """Sums over texts, of one layer. Products are float32, sums over texts float64."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, query: Tensor, key: Tensor, block_size: int) -> None:
        """Count one text, from its first token.

        Args:
            query: [T, H * G, D], post-RoPE; query heads of a group are adjacent.
            key: [T, H, D], post-RoPE.
        """
        use = counted(len(key), block_size)
        if not use:
            return
        heads, dim = key.shape[1:]
        keys = key[use.start : use.stop].float()
        blocks = keys.unflatten(0, (-1, block_size))
        apart = (blocks - blocks.mean(1, keepdim=True)).flatten(0, 1)
        # [T, H * G, D] -> [H, T * G, D]
        lookups = query[use.start : use.stop].float().view(len(use), heads, -1, dim)
        lookups = lookups.transpose(0, 1).flatten(1, 2)
        residuals = apart.transpose(0, 1)
        found = (
            (residuals.transpose(1, 2) @ residuals).double(),
            (lookups.transpose(1, 2) @ lookups).double() * (len(use) / lookups.shape[1]),
            keys.sum(0).double(),
        )
        sums = self._sums
        self._sums = found if sums is None else (
            sums[0] + found[0], sums[1] + found[1], sums[2] + found[2]
        )  # fmt: skip
        self.tokens += len(use)

    def means(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of residuals [H, D, D], of queries [H, D, D] and the mean key [H, D]: float64, CPU."""
        assert self._sums is not None, "no text has been counted"
        residuals, queries, keys = (part.cpu() / self.tokens for part in self._sums)
        return residuals, queries, keys

    def axes(self) -> Axes:
        """The axes that balance them.

        Raises:
            ValueError: a moment is not finite.
        """
        parts = self.means()
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise ValueError("keys or queries that are not finite")
        return balanced_axes(*parts)
