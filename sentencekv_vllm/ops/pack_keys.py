# SPDX-License-Identifier: Apache-2.0
"""Codes of a page's keys: the mean of the page, and one or two bits of what a token adds to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Basis

MEAN_LEVELS = 127
SCALE_LIMIT = 2.0**40
"""A scale that is not below it, or no number, is 0: products of scales and codes stay finite."""


@dataclass(frozen=True)
class PackedKeys:
    """The index of pages; N tokens, D channels, W sign planes."""

    codes: Tensor  # [..., H, W / 8, N] uint8: bit j of byte (i, t) is plane 8i + j of token t
    scales: Tensor  # [..., H, N] bfloat16
    means: Tensor  # [..., H, D] int8
    mean_scales: Tensor  # [..., H] float32


def pack_keys(keys: Tensor, basis: Basis, code_width: int) -> PackedKeys:
    """Code the keys of pages, each on its own.

    With `z = key @ key_map - center`, the page's mean of z is kept on a grid of 255 levels, and of
    the first C = W / bits channels of what a token adds to it, x, the code c:
      1 bit: the sign of each channel, one plane a channel;
      2 bits: -3, -1, 1 or 3, whose threshold is the root mean square of the token's channels:
        plane c is the sign s of channel c, plane C + c is t in {-1, 1} with c = 2 s + t.
    A token's scale is |x|^2 / <c, x>, which makes `scale * <query, c>` an estimate of `<query, x>`
    without bias towards x (RaBitQ, arXiv 2405.12497). A scale beyond SCALE_LIMIT is 0.

    Args:
        keys: [..., H, N, D], post-RoPE, any float dtype.
        code_width: W.
    """
    z = keys.float() @ basis.key_map - basis.center[:, None]
    mean = z.mean(-2)
    mean_scales = mean.abs().amax(-1) / MEAN_LEVELS
    mean_scales = torch.where(mean_scales < SCALE_LIMIT, mean_scales, 0.0)
    inverse = torch.where(mean_scales > 0, 1 / mean_scales, 0.0)[..., None]
    means = torch.round(mean * inverse).nan_to_num(0.0).to(torch.int8)
    x = z - (means.float() * mean_scales[..., None])[..., None, :]
    x = x[..., : code_width // basis.bits]
    negative = x < 0
    squares = x.square()
    square = squares.sum(-1)
    product = x.abs().sum(-1)
    planes = ~negative
    if basis.bits == 2:
        outer = squares * x.shape[-1] >= square[..., None]
        product = product + 2 * (x.abs() * outer).sum(-1)
        planes = torch.cat((planes, negative ^ outer), -1)
    scales = torch.where(product > 0, square / product, 0.0)
    scales = torch.where(scales < SCALE_LIMIT, scales, 0.0).to(torch.bfloat16)
    return PackedKeys(_bytes(planes), scales, means, mean_scales)


def _bytes(planes: Tensor) -> Tensor:
    """[..., N, W] bool -> [..., W / 8, N] uint8."""
    ones = planes.to(torch.uint8).transpose(-1, -2).unflatten(-2, (-1, 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=planes.device)
    return (ones << shifts[:, None]).sum(-2, dtype=torch.uint8)


def unpack_signs(codes: Tensor) -> Tensor:
    """codes [..., W / 8, N] -> signs of the planes [..., N, W] int8, +1 or -1."""
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    ones = (codes.unsqueeze(-2) >> shifts[:, None]) & 1  # [..., W / 8, 8, N]
    return (ones.to(torch.int8) * 2 - 1).flatten(-3, -2).transpose(-1, -2)
