# SPDX-License-Identifier: Apache-2.0
"""The scale of 1-bit keys: unbiased over rotations, with the error that docs/method.md states."""

from __future__ import annotations

import math

import pytest
import torch

from sentencekv_vllm.ops.pack_keys import pack_keys, unpack_signs
from sentencekv_vllm.ops.rotation import rotation

D, DRAWS = 64, 1500


def random_rotation(generator: torch.Generator) -> torch.Tensor:
    q, r = torch.linalg.qr(torch.randn(D, D, generator=generator))
    return q * r.diagonal().sign()


@pytest.mark.parametrize("index_dim", [64, 32, 16])
def test_estimates_are_unbiased_with_the_stated_error(index_dim):
    generator = torch.Generator().manual_seed(index_dim)
    keys = torch.randn(3, D, generator=generator)
    keys[0, 5] = 20  # an outlier channel
    keys[2] *= 0.01
    query = torch.randn(D, generator=generator) + 0.1 * keys[0]
    estimates = []
    for _ in range(DRAWS):
        turn = random_rotation(generator)[:, :index_dim]
        bits, scales = pack_keys(keys, turn)
        estimates.append(scales.float() * (unpack_signs(bits).float() @ (query @ turn)))
    found, exact = torch.stack(estimates).double(), (keys @ query).double()
    # Of the part of the query that is perpendicular to the key: the other is exact.
    apart = query.norm() * (1 - (exact / keys.norm(dim=-1) / query.norm()).square()).sqrt()
    error = math.sqrt(math.pi / (2 * index_dim) - 1 / D) * apart * keys.norm(dim=-1)
    assert bool(((found.mean(0) - exact).abs() < 4 * error / math.sqrt(DRAWS)).all())
    assert found.std(0).tolist() == pytest.approx(error.tolist(), rel=0.12)


@pytest.mark.parametrize("head_dim", [128, 96])
def test_fewer_channels_are_the_first_columns_of_the_same_basis(head_dim):
    part = rotation(head_dim, 40)
    assert torch.equal(part, rotation(head_dim)[:, :40])
    torch.testing.assert_close(part.T @ part, torch.eye(40), rtol=0, atol=1e-5)


def test_bits_of_fewer_channels_are_a_prefix_and_scales_grow():
    keys = torch.randn(2, 16, 128, generator=torch.Generator().manual_seed(0))
    bits, scales = pack_keys(keys, rotation(128))
    fewer, larger = pack_keys(keys, rotation(128, 32))
    assert torch.equal(fewer, bits[..., :4, :])
    assert bool((larger > scales).all())
