# SPDX-License-Identifier: Apache-2.0
"""Rotated queries on a 6-bit grid, so that scores over sign bits are exact integers."""

from __future__ import annotations

import torch
from torch import Tensor

QUERY_LEVELS = 31  # four channels sum to at most 124: a byte table holds every 4-bit group


def quantize_query(query: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate and round queries.

    With integers on both sides, table look-ups (CPU), tensor cores and popcounts (GPU)
    all return the same score, bit for bit. The rounding error is some 2% of the query's
    norm, far below the error of the 1-bit keys.

    Args:
        query: [..., D], any float dtype.
        rotation: [D, E] float32.

    Returns:
        levels [..., E] int8 in [-31, 31]; step [...] float32 with
        `query @ rotation ~ levels * step`. A zero query has step 0.
    """
    rotated = query.float() @ rotation
    step = rotated.abs().amax(-1) / QUERY_LEVELS
    inverse = torch.where(step > 0, 1 / step, 0.0)
    levels = torch.round(rotated * inverse[..., None]).to(torch.int8)
    return levels, step
