# SPDX-License-Identifier: Apache-2.0
"""How many GPU blocks a request needs whose history visits the device layer by layer.

One formula for the KV cache spec, the check at start-up, the check of a request in the API
process and admission, so that what was promised can be kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

from ..resolved import ResolvedConfig


@dataclass(frozen=True)
class VisitRoom:
    """The sizes of a server that the need depends on; tokens where nothing else is said."""

    block_size: int
    num_layers: int  # of a worker: one private block stages that many blocks of one layer
    halves: int  # staging areas: 1 on a CPU, 2 where copies and attention overlap
    sink_blocks: int
    recent_tokens: int
    max_sentence_tokens: int
    in_flight_tokens: int  # scheduled at once, steps that have not returned included
    working_set_blocks: int

    @classmethod
    def of(cls, resolved: ResolvedConfig, halves: int, in_flight_tokens: int) -> Self:
        """Of a server with these settings; see the fields."""
        return cls(
            block_size=resolved.block_size,
            num_layers=resolved.num_layers,
            halves=halves,
            sink_blocks=resolved.sink_blocks,
            recent_tokens=resolved.config.recent_window,
            max_sentence_tokens=resolved.config.max_sentence_tokens,
            in_flight_tokens=in_flight_tokens,
            working_set_blocks=resolved.working_set_blocks,
        )

    @cached_property
    def window_blocks(self) -> int:
        """Most blocks that are held after the history: the recent window or the open sentence,
        and what is in flight."""
        n, flight = self.block_size, self.in_flight_tokens
        by_window = max(-(-(x + flight) // n) + -(-(self.recent_tokens - x) // n) for x in range(n))
        by_sentence = -(-(n - 1 + flight) // n) + -(-(self.max_sentence_tokens - 1) // n)
        return max(by_window, by_sentence)

    @property
    def in_flight_blocks(self) -> int:
        """Most blocks that the tokens in flight touch."""
        return -(-self.in_flight_tokens // self.block_size) + 1

    def visiting_blocks(self, tokens: int) -> int:
        """Most blocks of a history that leave the device before the last token is computed."""
        return max(0, (tokens - self.recent_tokens) // self.block_size - self.sink_blocks)

    def staging_blocks(self, tokens: int) -> int:
        """Private blocks that hold one layer of that history, in each half."""
        return -(-self.halves * self.visiting_blocks(tokens) // self.num_layers)

    def private_blocks(self, tokens: int) -> int:
        """Drawn at admission: staging during the prefill, the working set afterwards."""
        return max(self.staging_blocks(tokens), self.working_set_blocks)

    def floor(self, tokens: int) -> int:
        """GPU blocks that suffice from admission to the end, however the prefill is cut.

        Args:
            tokens: prompt, and what has been generated where it is prefilled again.
        """
        return self.sink_blocks + self.window_blocks + self.private_blocks(tokens)

    def longest(self, num_blocks: int, num_pages: int) -> int:
        """Tokens of the longest request that `num_blocks` GPU blocks and `num_pages` host pages
        serve; 0 if there is none."""
        low, high = 0, num_pages * self.block_size
        if self.floor(0) > num_blocks:
            return 0
        while low < high:
            middle = (low + high + 1) // 2
            if self.floor(middle) <= num_blocks:
                low = middle
            else:
                high = middle - 1
        return low
