# SPDX-License-Identifier: Apache-2.0
"""Which blocks of the history each KV head selected, at every step of one answer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

MISS = 0x8000
"""Bit of an entry of `Trace.selected`: the block had to be copied from the swap pool."""
ABSENT = 0xFFFF
"""Entry behind the last of a head."""
MOST_BLOCKS = 0x7FFF
"""Blocks that an entry can name."""


@dataclass(frozen=True)
class Trace:
    """T sparse decode steps of one request, in L layers with H KV heads each.

    Block j holds tokens [j * N, (j + 1) * N) of the request, its prompt first.
    """

    block_size: int  # N, tokens
    layers: tuple[int, ...]  # as the model counts them
    lengths: NDArray[np.int32]  # [T] tokens of the request, the step's own included
    history: NDArray[np.int32]  # [T, 2] first block after the sinks, and of the recent window
    selected: NDArray[np.uint16]  # [T, L, H, K] blocks, ascending; with MISS, or ABSENT
    estimate: NDArray[np.float32]  # [T, L] share of the attention on what was read; NaN: unknown
    left_out: int  # sparse steps that there was no room for

    def before(self, length: int) -> Trace:
        """The steps whose request was shorter, in tokens."""
        kept = self.lengths < length
        return replace(
            self,
            lengths=self.lengths[kept],
            history=self.history[kept],
            selected=self.selected[kept],
            estimate=self.estimate[kept],
        )

    @property
    def blocks(self) -> NDArray[np.int64]:
        """[T, L, H, K], -1 where absent."""
        named = (self.selected & MOST_BLOCKS).astype(np.int64)
        return np.where(self.selected == ABSENT, -1, named)

    @property
    def num_misses(self) -> int:
        present = self.selected != ABSENT
        return int(((self.selected & MISS).astype(bool) & present).sum())

    @property
    def num_hits(self) -> int:
        return int((self.selected != ABSENT).sum()) - self.num_misses

    def block_shares(self) -> NDArray[np.float64]:
        """[blocks] share of all steps, layers and KV heads that selected a block."""
        blocks = self.blocks
        counts = np.bincount(blocks[blocks >= 0], minlength=int(self.history.max(initial=0)))
        return counts / max(1, int(np.prod(blocks.shape[:3])))

    def sentence_shares(self, ends: NDArray[np.int32]) -> NDArray[np.float64]:
        """The same for sentences: the mean over their tokens.

        Args:
            ends: [n] increasing, sentence i is the tokens [ends[i - 1], ends[i]).
        """
        shares = np.zeros(int(ends[-1]))
        of_tokens = np.repeat(self.block_shares(), self.block_size)[: len(shares)]
        shares[: len(of_tokens)] = of_tokens
        total = np.concatenate(([0.0], np.cumsum(shares)))
        starts = np.concatenate(([0], ends[:-1]))
        return (total[ends] - total[starts]) / (ends - starts)
