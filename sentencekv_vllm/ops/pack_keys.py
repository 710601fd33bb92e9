# SPDX-License-Identifier: Apache-2.0
"""1-bit token keys: sign bits of the rotated key and one scale per token."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_keys(keys: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Reduce keys to sign bits and scales.

    Args:
        keys: [..., N, D], post-RoPE, any float dtype.
        rotation: [D, E] float32, orthonormal columns.

    Returns:
        bits [..., E / 8, N] uint8: bit j of byte (i, t) is 1 where the rotated channel
        8i + j of token t is >= 0; scales [..., N] bfloat16: |key|^2 / sum|x| with x the E
        rotated channels, which makes `scale * <query, sign>` an unbiased estimate of
        `<query, key>` (RaBitQ's estimator, arXiv 2405.12497; docs/method.md for E < D).
        A key that is zero in all E channels has scale 0.
    """
    rotated = keys.float() @ rotation
    signs = (rotated >= 0).to(torch.uint8).transpose(-1, -2)  # [..., E, N]
    shifts = torch.arange(8, dtype=torch.uint8, device=keys.device)
    bits = (signs.unflatten(-2, (-1, 8)) << shifts[:, None]).sum(-2, dtype=torch.uint8)
    l1 = rotated.abs().sum(-1)
    scales = torch.where(l1 > 0, keys.float().square().sum(-1) / l1, 0.0)
    return bits, scales.to(torch.bfloat16)


def unpack_signs(bits: Tensor) -> Tensor:
    """bits [..., E / 8, N] -> signs [..., N, E] int8, +1 or -1."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    ones = (bits.unsqueeze(-2) >> shifts[:, None]) & 1  # [..., E / 8, 8, N]
    return (ones.to(torch.int8) * 2 - 1).flatten(-3, -2).transpose(-1, -2)
