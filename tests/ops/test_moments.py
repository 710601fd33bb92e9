# SPDX-License-Identifier: Apache-2.0
"""Moments are what a loop over tokens finds, and balancing by them makes codes better."""

from __future__ import annotations

import pytest
import torch

from sentencekv_vllm.ops.basis import coded_basis, plain_basis
from sentencekv_vllm.ops.moments import SKIPPED, Moments
from sentencekv_vllm.ops.pack_keys import pack_keys, unpack_signs
from sentencekv_vllm.ops.quantize_query import quantize_query

HEADS, GROUP = 2, 3


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_moments_are_those_of_a_loop_over_tokens():
    block, dim, first = 24, 8, 72  # whole blocks behind the 64 skipped tokens
    texts = [(normal(150, HEADS * GROUP, dim, seed=i), normal(150, HEADS, dim, seed=9 + i) + 5)
             for i in range(2)]  # fmt: skip
    moments = Moments()
    for query, key in texts:
        moments.add(query, key, block)
    residuals = torch.zeros(HEADS, dim, dim, dtype=torch.float64)
    queries, mean = torch.zeros_like(residuals), torch.zeros(HEADS, dim, dtype=torch.float64)
    count = 0
    for query, key in texts:
        for start in range(first, 144, block):
            for token in range(start, start + block):
                count += 1
                for head in range(HEADS):
                    own = key[start : start + block, head].double()
                    apart = key[token, head].double() - own.mean(0)
                    residuals[head] += torch.outer(apart, apart)
                    mean[head] += key[token, head].double()
                    for member in range(GROUP):
                        q = query[token, head * GROUP + member].double()
                        queries[head] += torch.outer(q, q) / GROUP
    assert moments.tokens == count == 2 * 72
    for found, sums in zip(moments.means(), (residuals, queries, mean), strict=True):
        torch.testing.assert_close(found, sums / count, rtol=1e-5, atol=1e-5)


def test_a_text_no_longer_than_what_is_skipped_counts_nothing():
    moments = Moments()
    moments.add(normal(SKIPPED, 2, 8), normal(SKIPPED, 2, 8), 32)
    assert moments.tokens == 0


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_keys_that_are_not_finite_give_no_axes(broken):
    key = normal(128, 2, 8)
    key[100, 1, 3] = broken
    moments = Moments()
    moments.add(normal(128, 2, 8), key, 16)
    with pytest.raises(ValueError, match="not finite"):
        moments.axes()


def anisotropic(seed: int, tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys: keys are wide where queries hardly look, as those of some models."""
    turn = torch.linalg.qr(normal(dim, dim, seed=77))[0]
    wide = torch.logspace(-1, 1, dim)
    query = normal(tokens, HEADS * GROUP, dim, seed=seed) / wide @ turn
    return query, (normal(tokens, HEADS, dim, seed=seed + 1) * wide + 3) @ turn


def error(basis, width: int, block: int, dim: int) -> float:
    """Of estimated logits, next to the spread of the exact ones, on tokens of another draw."""
    query, key = anisotropic(50, 640, dim)
    pages = key.unflatten(0, (-1, block)).transpose(1, 2)  # [P, H, N, D]
    lookups = query[:50].unflatten(1, (HEADS, GROUP))
    packed, quantized = pack_keys(pages, basis, width), quantize_query(lookups, basis, width)
    dots = torch.einsum(
        "shgw,phnw->shgpn", quantized.levels.float(), unpack_signs(packed.codes).float()
    )
    fine = dots * quantized.step[..., None, None] * packed.scales.float().transpose(0, 1)[:, None]
    means = packed.means.float() * packed.mean_scales[..., None]
    coarse = torch.einsum("shgd,phd->shgp", quantized.mean_levels.float(), means)
    estimate = fine + (coarse * quantized.mean_step[..., None])[..., None]
    exact = torch.einsum("shgd,phnd->shgpn", lookups, pages)
    apart = estimate - exact
    apart = apart - apart.mean((-1, -2), keepdim=True)  # the same for all tokens: no difference
    return float(apart.std() / exact.std())


@pytest.mark.parametrize("dim, channels", [(64, 32), (64, 64), (80, 40)])
def test_codes_in_the_balanced_basis_estimate_better_than_in_the_fixed_one(dim, channels):
    block = 16
    moments = Moments()
    moments.add(*anisotropic(1, 2048, dim), block)
    width = 2 * channels
    balanced = error(coded_basis(moments.axes(), channels, 2), width, block, dim)
    fixed = error(plain_basis(HEADS, dim, width), width, block, dim)
    assert balanced < 0.6 * fixed


def test_a_basis_keeps_products_and_depends_on_nothing_but_the_axes():
    query, key = anisotropic(3, 300, 64)
    moments = Moments()
    moments.add(query, key, 16)
    axes = moments.axes()
    for channels, bits in ((16, 2), (32, 1), (64, 2)):
        basis = coded_basis(axes, channels, bits)
        assert basis.bits == bits
        same = basis.query_map.double() @ basis.key_map.double().mT
        torch.testing.assert_close(
            same, torch.eye(64).double().expand(2, -1, -1), rtol=0, atol=1e-4
        )
        torch.testing.assert_close(
            basis.center.double(),
            torch.einsum("hd,hde->he", axes.mean, basis.key_map.double()),
            rtol=1e-4,
            atol=1e-4,
        )
