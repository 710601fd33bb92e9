# SPDX-License-Identifier: Apache-2.0
"""Channels of the 1-bit index that a step reads, chosen by its query."""

from __future__ import annotations

import torch
from torch import Tensor


def choose_channels(levels: Tensor, byte_rows: int) -> Tensor:
    """The byte rows of the index in which the queries of a KV head have most energy.

    A row is eight rotated channels. Its energy is the sum of squared levels over its channels
    and the group's heads, an integer, so that every implementation chooses the same rows.
    Equal energies: the lower row first.

    Args:
        levels: [..., G, E] int8, see `quantize_query`.
        byte_rows: rows to keep.

    Returns:
        [..., E / 8] bool.
    """
    energy = levels.int().square().sum(-2).unflatten(-1, (-1, 8)).sum(-1)
    order = energy.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(energy, dtype=torch.bool)
    return chosen.scatter(-1, order[..., :byte_rows], True)
