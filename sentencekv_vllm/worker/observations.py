# SPDX-License-Identifier: Apache-2.0
"""Queries of the last prompt tokens, kept until they have voted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Geometry


@dataclass(frozen=True)
class Observed:
    """Where a step's voting tokens are in the batch, and where their queries go."""

    tokens: Tensor  # [n] int64: positions in the batch
    places: Tensor  # [n] int64: `slot * window + place in the window`


class Observations:
    """[slots * window, Hq, D] a layer, allocated once; empty where `window` is 0."""

    def __init__(
        self,
        geometry: Geometry,
        num_slots: int,
        window: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.window = window
        shape = (num_slots * window, geometry.num_query_heads, geometry.head_dim)
        self._queries = torch.empty(geometry.num_layers, *shape, dtype=dtype, device=device)

    @property
    def num_bytes(self) -> int:
        return self._queries.nbytes

    def put(self, layer: int, query: Tensor, observed: Observed) -> None:
        """Keep the voting tokens' queries of `query` [tokens, Hq, D]."""
        self._queries[layer].index_copy_(0, observed.places, query.index_select(0, observed.tokens))

    def at(self, layer: int, places: Tensor) -> Tensor:
        """[n, Hq, D]: the queries at the given places, as in `Observed`."""
        return self._queries[layer].index_select(0, places)

    def of(self, layer: int, slot: int, count: int) -> Tensor:
        """[count, Hq, D]: the slot's window, the prompt's last `count` tokens."""
        first = slot * self.window
        return self._queries[layer, first : first + count]
