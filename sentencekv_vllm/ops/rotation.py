# SPDX-License-Identifier: Apache-2.0
"""The fixed random rotation that makes one sign bit a channel informative."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

SEED = 20250400970


def is_hadamard(head_dim: int) -> bool:
    """Whether `rotation` is a Hadamard matrix with signed rows: its first column has the signs."""
    return head_dim & (head_dim - 1) == 0


@cache
def rotation(head_dim: int, index_dim: int | None = None) -> Tensor:
    """First E columns of a fixed orthogonal matrix, [D, E] float32, on the CPU.

    The same in every process. Powers of two: Hadamard matrix with random row signs,
    normalised. Other sizes: the Q factor of a Gaussian matrix. Rotated vectors are
    `x @ rotation(D)`, and inner products do not change, so queries are rotated and nothing
    else is. With E < D channels they are projected on a random subspace.
    """
    if index_dim is not None and index_dim != head_dim:
        return rotation(head_dim)[:, :index_dim].contiguous()
    generator = torch.Generator().manual_seed(SEED + head_dim)
    if is_hadamard(head_dim):
        hadamard = torch.ones(1, 1)
        while len(hadamard) < head_dim:
            hadamard = torch.cat(
                (torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1))
            )
        signs = torch.randint(0, 2, (head_dim,), generator=generator) * 2 - 1
        return (signs[:, None] * hadamard / head_dim**0.5).contiguous()
    gaussian = torch.randn(head_dim, head_dim, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).float().contiguous()
