# SPDX-License-Identifier: Apache-2.0
"""Queries of the decode step before, which rank where nothing may wait for the current one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Geometry


class QueryPrevious:
    """The last query of each slot and layer, allocated at the first use of a layer."""

    def __init__(self, geometry: Geometry, num_slots: int) -> None:
        self._shape = (num_slots, geometry.num_query_heads, geometry.head_dim)
        self._last: dict[int, Tensor] = {}

    def exchange(self, layer: int, slots: Tensor, query: Tensor, restarts: Tensor) -> Tensor:
        """Keep this step's queries and return those of the step before.

        Args:
            layer: index of the layer.
            slots: [S] int64, distinct.
            query: [S, Hq, D].
            restarts: [S] bool: the first sparse step of the request; its own query is returned.

        Returns:
            [S, Hq, D] like `query`.
        """
        if layer not in self._last:
            self._last[layer] = query.new_zeros(self._shape)
        before = torch.where(restarts[:, None, None], query, self.of(layer, slots))
        self.keep(layer, slots, query)
        return before

    def has(self, layer: int) -> bool:
        """The layer has exchanged queries."""
        return layer in self._last

    def of(self, layer: int, slots: Tensor) -> Tensor:
        """[S, Hq, D]: the last query kept of each slot, for layers that have exchanged some."""
        return self._last[layer][slots]

    def keep(self, layer: int, slots: Tensor, query: Tensor) -> None:
        """Keep this step's queries; arguments as in `exchange`."""
        self._last[layer][slots] = query
