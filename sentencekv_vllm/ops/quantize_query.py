# SPDX-License-Identifier: Apache-2.0
"""Mapped queries on integer grids, so that the products with codes and means are exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Basis
from .pack_keys import MEAN_LEVELS, SCALE_LIMIT

CODE_LEVELS = {1: 31, 2: 15}
"""By the bits of a code; four planes sum to at most 124, so that a byte table holds every four
bits, and a level times the weight of its plane has six bits."""


@dataclass(frozen=True)
class QuantizedQuery:
    """A query for the two parts of an estimate."""

    levels: Tensor  # [..., W] int8 in [-31, 31]: for the sign planes, their weights included
    step: Tensor  # [...] float32
    mean_levels: Tensor  # [..., D] int8 in [-127, 127]
    mean_step: Tensor  # [...] float32


def quantize_query(query: Tensor, basis: Basis, code_width: int) -> QuantizedQuery:
    """Map and round queries.

    With y = query @ query_map, `mean_levels * mean_step ~ y` and, for its first C channels,
    `level * step ~ y`. Two bits of a code are the planes s and t of `2 s + t`: the level of
    channel c is 2 `level` at plane c and `level` at plane C + c. A query whose step is 0, no
    number, or not below SCALE_LIMIT, has levels and step of 0.

    Args:
        query: [..., H, G, D], any float dtype.
        code_width: W.
    """
    y = query.float() @ basis.query_map
    coded = y[..., : code_width // basis.bits]
    levels, step = _rounded(coded, CODE_LEVELS[basis.bits])
    if basis.bits == 2:
        levels = torch.cat((2 * levels, levels), -1)
    return QuantizedQuery(levels, step, *_rounded(y, MEAN_LEVELS))


def _rounded(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    step = x.abs().amax(-1) / levels
    step = torch.where(step < SCALE_LIMIT, step, 0.0)
    inverse = torch.where(step > 0, 1 / step, 0.0)
    rounded = torch.round(x * inverse[..., None]).nan_to_num(0.0, 0.0, 0.0)
    return rounded.clamp(-levels, levels).to(torch.int8), step
