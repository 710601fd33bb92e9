# SPDX-License-Identifier: Apache-2.0
"""Running mean of the queries of the sentence being generated (arXiv 2504.00970, Alg. 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Geometry


class QueryMean:
    """Sums and counts per layer and slot, allocated at the first use of a layer."""

    def __init__(self, geometry: Geometry, num_slots: int) -> None:
        self._shape = (num_slots, geometry.num_query_heads, geometry.head_dim)
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, Tensor] = {}

    def add(self, layer: int, slots: Tensor, query: Tensor, restarts: Tensor) -> Tensor:
        """Add this step's queries and return the means.

        Args:
            layer: index of the layer.
            slots: [S] int64.
            query: [S, Hq, D].
            restarts: [S] bool: the mean starts anew, with a sentence or with the request.

        Returns:
            [S, Hq, D] float32.
        """
        if layer not in self._sums:
            self._sums[layer] = torch.zeros(self._shape, device=query.device)
            self._counts[layer] = torch.zeros(self._shape[0], device=query.device)
        # Not a product with 0 or 1: a former owner of the slot may have left a NaN.
        sums = self._sums[layer][slots].masked_fill(restarts[:, None, None], 0) + query.float()
        counts = self._counts[layer][slots].masked_fill(restarts, 0) + 1
        self._sums[layer][slots] = sums
        self._counts[layer][slots] = counts
        return sums / counts[:, None, None]
