# SPDX-License-Identifier: Apache-2.0
"""The basis in which keys are coded: fixed where nothing is known of a model, else balanced.

A code of few bits errs by about |q| |r|, r what is coded. A matrix A for keys and its inverse for
queries leave the products alone and can make that small: E|A r|^2 E|A^-1 q|^2 is least where A^2
is the geometric mean of the inverse second moment of the residuals and the second moment of the
queries. In that basis the residuals' spread falls steeply, so the first channels get the bits
(transform coding) and are rotated within themselves, which makes them equally wide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Basis
from .rotation import rotation

CPU = torch.device("cpu")
SHRINKAGE = 1.0
"""Mean spreads that are added to every channel of a second moment. Moments are estimates, from
early positions: full trust in them costs lookups where a model's channels are alike (SmolLM2), and
this much distrust costs none where they are not (Qwen); docs/results.md."""


def plain_basis(
    num_heads: int, head_dim: int, code_width: int, device: torch.device = CPU
) -> Basis:
    """The fixed rotation: one bit of each channel, or two where the width has room for them.

    Args:
        code_width: sign planes of a token.
    """
    matrix = rotation(head_dim).to(device).expand(num_heads, -1, -1).contiguous()
    bits = 1 if code_width <= head_dim else 2
    return Basis(matrix, matrix.clone(), torch.zeros(num_heads, head_dim, device=device), bits)


@dataclass(frozen=True)
class Axes:
    """The balanced channels of a layer, widest first, before any is coded; on the CPU."""

    keys: Tensor  # [H, D, D]: of `key @ keys`
    queries: Tensor  # [H, D, D]: the counterpart, <query @ queries, key @ keys> = <query, key>
    mean: Tensor  # [H, D]: of all keys, not mapped


def balanced_axes(residuals: Tensor, queries: Tensor, mean: Tensor) -> Axes:
    """The channels in which the error of codes is small.

    Args:
        residuals: [H, D, D] float64, second moments of keys less the mean of their block.
        queries: [H, D, D] float64, second moments of the queries of each KV head.
        mean: [H, D] float64, of all keys.

    Returns:
        float64.
    """
    keys, lookups = [], []
    for r, q in zip(residuals, queries, strict=True):
        balance, inverse = _balance(_shrunk(r), _shrunk(q))
        spread, vectors = torch.linalg.eigh(balance @ r @ balance)
        del spread  # ascending; the widest channels come first
        turned = vectors.flip(1)
        # The sign of an eigenvector is free: the same on every machine by its largest element.
        largest = turned.gather(0, turned.abs().argmax(0, keepdim=True))
        turned = turned * largest.sign()
        keys.append(balance @ turned)
        lookups.append(inverse @ turned)
    return Axes(torch.stack(keys), torch.stack(lookups), mean)


def coded_basis(axes: Axes, channels: int, bits: int, device: torch.device = CPU) -> Basis:
    """The basis whose codes are of the first `channels` axes, each part rotated within itself.

    Args:
        channels: C, that are coded.
        bits: of a code.

    Returns:
        float32 on the device; computed in float64 on the CPU.
    """
    head_dim = axes.keys.shape[-1]
    joint = torch.zeros(head_dim, head_dim, dtype=torch.float64)
    joint[:channels, :channels] = rotation(channels)
    if channels < head_dim:
        joint[channels:, channels:] = rotation(head_dim - channels)
    key_map = axes.keys.double() @ joint
    query_map = axes.queries.double() @ joint
    center = torch.einsum("hd,hde->he", axes.mean.double(), key_map)
    key_map, query_map, center = (x.float().to(device) for x in (key_map, query_map, center))
    return Basis(key_map, query_map, center, bits)


def balanced_basis(residuals: Tensor, queries: Tensor, mean: Tensor, channels: int) -> Basis:
    """The basis that makes the error of two-bit codes of the first `channels` channels small.

    Args:
        residuals, queries, mean: as in `balanced_axes`.
        channels: C, that are coded.

    Returns:
        float32 on the CPU, `bits` 2.
    """
    return coded_basis(balanced_axes(residuals, queries, mean), channels, bits=2)


def _shrunk(moment: Tensor) -> Tensor:
    dim = len(moment)
    spread = moment.trace() / dim
    return moment + SHRINKAGE * spread * torch.eye(dim, dtype=moment.dtype)


def _balance(residuals: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """A and A^-1 with A^2 = R^-1/2 (R^1/2 Q R^1/2)^1/2 R^-1/2, symmetric."""
    root = _power(residuals, 0.5)
    inverse_root = _power(residuals, -0.5)
    square = inverse_root @ _power(root @ queries @ root, 0.5) @ inverse_root
    return _power(square, 0.5), _power(square, -0.5)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    values = values.clamp(min=max(float(values[-1]), 1e-30) * 1e-9)
    return (vectors * values.pow(exponent)) @ vectors.T
