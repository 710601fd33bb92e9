# SPDX-License-Identifier: Apache-2.0
"""A fixed random rotation, which makes the bits of all channels equally informative."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

SEED = 20250400970


@cache
def rotation(dim: int) -> Tensor:
    """A fixed orthogonal matrix, [dim, dim] float32, on the CPU.

    The same in every process. Powers of two: Hadamard matrix with random row signs, normalised.
    Other sizes: the Q factor of a Gaussian matrix. Rotated vectors are `x @ rotation(dim)`.
    """
    generator = torch.Generator().manual_seed(SEED + dim)
    if dim & (dim - 1) == 0:
        hadamard = torch.ones(1, 1)
        while len(hadamard) < dim:
            hadamard = torch.cat(
                (torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1))
            )
        signs = torch.randint(0, 2, (dim,), generator=generator) * 2 - 1
        return (signs[:, None] * hadamard / dim**0.5).contiguous()
    gaussian = torch.randn(dim, dim, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).float().contiguous()
