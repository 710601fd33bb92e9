# SPDX-License-Identifier: Apache-2.0
"""Codes of keys: unbiased over rotations, better where bits lie where the spread is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sentencekv_vllm.ops.basis import balanced_basis, plain_basis
from sentencekv_vllm.ops.pack_keys import pack_keys, unpack_signs
from sentencekv_vllm.types import Basis

D, N, DRAWS = 64, 16, 1500


def random_basis(generator: torch.Generator) -> Basis:
    q, r = torch.linalg.qr(torch.randn(D, D, generator=generator))
    turn = (q * r.diagonal().sign())[None]
    return Basis(turn, turn, torch.zeros(1, D), 1)


def estimates(keys: Tensor, query: Tensor, basis: Basis, width: int) -> Tensor:
    """[N]: what the codes of one head's page say of its products with a query, in floats."""
    packed = pack_keys(keys[None], basis, width)
    y, signs = query @ basis.query_map[0], unpack_signs(packed.codes)[0].float()
    channels = width // basis.bits
    code = signs if basis.bits == 1 else 2 * signs[:, :channels] + signs[:, channels:]
    mean = packed.means[0].float() * packed.mean_scales[0] + basis.center[0]
    return packed.scales[0].float() * (code @ y[:channels]) + y @ mean


def test_one_bit_is_unbiased_with_the_stated_error():
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(N, D, generator=generator)
    query = torch.randn(D, generator=generator)
    found = torch.stack(
        [estimates(keys, query, random_basis(generator), D) for _ in range(DRAWS)]
    ).double()
    exact, residual = (keys @ query).double(), (keys - keys.mean(0)).double()
    along = residual @ query.double() / residual.norm(dim=-1)
    apart = (query.double().norm() ** 2 - along.square()).sqrt()
    error = math.sqrt(math.pi / (2 * D) - 1 / D) * apart * residual.norm(dim=-1)
    assert bool(((found.mean(0) - exact).abs() < 4.5 * error / math.sqrt(DRAWS)).all())
    assert found.std(0).tolist() == pytest.approx(error.tolist(), rel=0.12)


def test_what_all_keys_have_in_common_costs_nothing():
    """A shift of all keys of a page changes no estimate's error: it is in the mean."""
    generator = torch.Generator().manual_seed(2)
    keys, query = torch.randn(N, D, generator=generator), torch.randn(D, generator=generator)
    shift = 40 * torch.randn(D, generator=generator)
    basis = plain_basis(1, D, 2 * D)
    near = estimates(keys, query, basis, 2 * D) - keys @ query
    far = estimates(keys + shift, query, basis, 2 * D) - (keys + shift) @ query
    # The mean is on a grid of 255 levels: what that adds is the same for all tokens.
    assert float((far - far.mean()).norm()) < 1.3 * float((near - near.mean()).norm()) + 0.05


@pytest.mark.parametrize("channels", [D // 4, D // 2])
def test_a_balanced_basis_beats_the_fixed_one_at_equal_bytes(channels):
    generator = torch.Generator().manual_seed(3)
    spread = torch.logspace(1.5, -1.5, D)[torch.randperm(D, generator=generator)]
    keys = torch.randn(4000, D, generator=generator) * spread
    queries = torch.randn(500, D, generator=generator) / spread.sqrt()
    r, q = (x.double().T @ x.double() / len(x) for x in (keys, queries))
    balanced = balanced_basis(r[None], q[None], torch.zeros(1, D, dtype=torch.float64), channels)
    width = 2 * channels
    plain = plain_basis(1, D, width)
    page = keys[:N]
    exact = page @ queries.T
    error = {
        name: float(
            (torch.stack([estimates(page, q, b, width) for q in queries], 1) - exact).norm()
        )
        for name, b in (("balanced", balanced), ("plain", plain))
    }
    assert error["balanced"] < 0.7 * error["plain"]


def test_a_basis_leaves_products_alone():
    generator = torch.Generator().manual_seed(4)
    factors = torch.randn(2, 3, D, D, dtype=torch.float64, generator=generator)
    basis = balanced_basis(*(factors @ factors.mT), torch.zeros(3, D, dtype=torch.float64), 24)
    product = basis.query_map.double() @ basis.key_map.double().mT
    torch.testing.assert_close(
        product, torch.eye(D, dtype=torch.float64).expand(3, D, D), atol=1e-3, rtol=0
    )


def test_two_bits_are_the_nearest_of_four_levels():
    generator = torch.Generator().manual_seed(5)
    keys = torch.randn(N, D, generator=generator)
    basis = plain_basis(1, D, 2 * D)
    packed = pack_keys(keys[None], basis, 2 * D)
    mean = packed.means[0].float() * packed.mean_scales[0]
    x = keys @ basis.key_map[0] - mean
    signs = unpack_signs(packed.codes)[0].float()
    code = 2 * signs[:, :D] + signs[:, D:]
    wide = x.abs() >= x.square().mean(1, keepdim=True).sqrt()
    assert torch.equal(code, torch.where(x < 0, -1.0, 1.0) * torch.where(wide, 3.0, 1.0))
    scale = x.square().sum(1) / (code * x).sum(1)
    torch.testing.assert_close(packed.scales[0].float(), scale, rtol=2**-8, atol=0)
