# SPDX-License-Identifier: Apache-2.0
"""Copy-out, codes, means and summaries equal their definitions."""

import math

import pytest
import torch

from sentencekv_vllm.ops.index_pages import index_pages as index_pages_reference
from sentencekv_vllm.ops.index_sentences import index_sentences as index_sentences_reference
from sentencekv_vllm.ops.pack_keys import unpack_signs
from sentencekv_vllm.types import IndexKind

SHAPES = [(64, 16), (80, 48), (96, 64), (128, 32), (256, 16)]
CODES = [  # head_dim, channels, bits, block_size
    (64, None, 1, 16),
    (64, 64, 2, 128),
    (80, 40, 2, 48),
    (96, None, 2, 64),
    (128, 64, 2, 32),
    (128, 24, 1, 16),
    (256, 128, 2, 16),
]
BFLOAT16_STEP = 2.0**-7  # largest relative distance of neighbours


def plain_offsets(head_dim, block_size):
    token = torch.arange(block_size, dtype=torch.int32)[:, None]
    return (token * 2 * head_dim + torch.arange(head_dim, dtype=torch.int32)).flatten()


def fill_cache(case):
    case.pools.cache.copy_(torch.randn(case.pools.cache.shape))
    case.pools.cache[:, :, :, case.geometry.head_dim :][0] = float("nan")  # V is only copied
    case.pools.cache[1, 0, 3, : case.geometry.head_dim] = 0  # a zero key has scale 0


def index(case, device, block_size):
    """Pools of definition and kernel after the same five blocks were copied out."""
    from sentencekv_vllm.triton_kernels.index_pages import index_pages

    blocks = torch.tensor([0, 5, 1, 9, 2], dtype=torch.int32)
    pages = torch.tensor([6, 0, 3, 8, 4], dtype=torch.int32)
    expected, actual = case.to("cpu").pools, case.to(device)
    offsets = plain_offsets(case.geometry.head_dim, block_size)
    index_pages_reference(expected, blocks, pages, offsets)
    index_pages(actual.pools, blocks.to(device), pages.to(device))
    return expected, actual.to("cpu").pools, blocks.long(), pages.long()


@pytest.mark.parametrize(("head_dim", "channels", "bits", "block_size"), CODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pages_are_byte_copies_with_the_codes_of_their_keys(
    build, kernels, head_dim, channels, bits, block_size, dtype
):
    shape = {"head_dim": head_dim, "channels": channels, "bits": bits, "dtype": dtype}
    case = build(build.row(tokens=7 * block_size), **shape, block_size=block_size)
    fill_cache(case)
    case.pools.page_slot.fill_(3)
    case.pools.page_kept.fill_(1)
    expected, result, blocks, pages = index(case, kernels, block_size)
    assert torch.equal(result.host.view(torch.int16), expected.host.view(torch.int16))
    for name in ("page_slot", "page_kept"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name
    torch.testing.assert_close(
        result.mean_scales[pages], expected.mean_scales[pages], rtol=1e-4, atol=0
    )
    changed = result.means != expected.means
    assert int((result.means.int() - expected.means.int()).abs().max()) <= 1
    assert changed.float().mean() < 2e-3, "two orders of summation round apart"
    # A code in doubt, of a few channels, moves the scale of its token as well.
    torch.testing.assert_close(
        result.scales[pages], expected.scales[pages], rtol=4 * BFLOAT16_STEP, atol=0
    )
    assert_codes_differ_in_doubt_only(case, result, expected, blocks, pages)
    untouched = torch.ones(len(result.codes), dtype=torch.bool)
    untouched[pages] = False
    for name in ("codes", "means"):
        assert torch.equal(getattr(result, name)[untouched], getattr(expected, name)[untouched])


def assert_codes_differ_in_doubt_only(case, result, expected, blocks, pages):
    """A plane may differ where its channel lies at a threshold, up to the order of summation."""
    basis, width = case.pools.basis, case.geometry.code_width
    keys = case.pools.cache[blocks, :, :, : case.geometry.head_dim].float()
    z = keys @ basis.key_map - basis.center[:, None]
    coarse = expected.means[pages].float() * expected.mean_scales[pages][..., None]
    x = (z - coarse[..., None, :])[..., : width // basis.bits]
    doubt = x.abs() < 1e-4
    if basis.bits == 2:
        edge = x.square().mean(-1, keepdim=True).sqrt()
        doubt = torch.cat((doubt, doubt | ((x.abs() - edge).abs() < 1e-4 * (1 + edge))), -1)
    # A mean that rounds to the next level moves all of its channel.
    moved = (result.means[pages] != expected.means[pages])[..., None, : width // basis.bits]
    doubt = doubt | torch.cat((moved,) * basis.bits, -1)
    same = unpack_signs(result.codes[pages]) == unpack_signs(expected.codes[pages])
    assert bool((same | doubt).all())
    assert same.float().mean() > 0.99


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 6e4])
def test_keys_that_are_no_numbers_have_scales_of_zero(build, kernels, number):
    case = build(build.row(tokens=7 * 32), block_size=32, dtype=torch.float16)
    case.pools.cache.copy_(torch.randn(case.pools.cache.shape))
    case.pools.cache[5, 1, 3, 7] = number
    expected, result, _, pages = index(case, kernels, 32)
    for name in ("scales", "mean_scales"):
        found = getattr(result, name)[pages]
        assert bool(found.isfinite().all())
        torch.testing.assert_close(found, getattr(expected, name)[pages], rtol=2e-2, atol=0)
    if not math.isfinite(number):
        assert not bool(result.mean_scales[0, 1].any() or result.means[0, 1].any())


@pytest.mark.parametrize("bits", [1, 2])
def test_equal_keys_are_their_mean(build, kernels, bits):
    """What a token adds is what the mean lacks: no more than half a level of a channel."""
    case = build(build.row(tokens=7 * 16), bits=bits)
    case.pools.cache.copy_(torch.randn(case.pools.cache.shape)[:, :, :1])
    expected, result, _, pages = index(case, kernels, 16)
    limit = result.mean_scales[pages].amax() * 0.51
    assert bool((result.scales[pages] <= limit).all())
    torch.testing.assert_close(result.scales[pages], expected.scales[pages], rtol=2e-2, atol=1e-6)


def test_a_server_without_codes_copies(build, kernels):
    case = build(build.row(tokens=7 * 16), codes=False)
    fill_cache(case)
    case.pools.page_slot.fill_(3)
    expected, result, *_ = index(case, kernels, 16)
    assert torch.equal(result.host.view(torch.int16), expected.host.view(torch.int16))
    assert torch.equal(result.page_slot, expected.page_slot)


@pytest.mark.parametrize("host_dtype", ["int8", "int4", "fp8"])
@pytest.mark.parametrize(
    ("head_dim", "block_size", "dtype"),
    [(64, 16, torch.bfloat16), (96, 48, torch.float16), (128, 32, torch.float32)],
)
def test_pages_of_lower_precision_are_those_of_the_reference(
    build, kernels, head_dim, block_size, dtype, host_dtype
):
    from sentencekv_vllm.triton_kernels.index_pages import index_pages

    shape = {"head_dim": head_dim, "block_size": block_size, "dtype": dtype}
    case = build(build.row(tokens=7 * block_size), host_dtype=host_dtype, **shape)
    case.pools.cache.copy_(torch.randn(case.pools.cache.shape))
    case.pools.cache[5, 0, 3:5] = 0
    case.pools.cache[9, 1, 2] = -3.3
    case.pools.cache[2, 0] *= 1000
    blocks = torch.tensor([0, 5, 1, 9, 2], dtype=torch.int32)
    pages = torch.tensor([6, 0, 3, 8, 4], dtype=torch.int32)
    expected, actual = case.to("cpu").pools, case.to(kernels)
    offsets = plain_offsets(head_dim, block_size)
    index_pages_reference(expected, blocks, pages, offsets)
    index_pages(actual.pools, blocks.to(kernels), pages.to(kernels))
    assert torch.equal(actual.pools.host.cpu(), expected.host)


@pytest.mark.parametrize("kind", [IndexKind.CENTROID, IndexKind.BOUNDS, IndexKind.MEAN_STD])
@pytest.mark.parametrize(("head_dim", "block_size"), SHAPES)
def test_summaries_are_those_of_keys_across_blocks(build, kernels, head_dim, block_size, kind):
    from sentencekv_vllm.triton_kernels.index_sentences import index_sentences

    case = build(build.row(tokens=4 * block_size), head_dim=head_dim, block_size=block_size)
    fill_cache(case)
    rows = torch.tensor([3, 40, 0, 7], dtype=torch.int32)
    spans = torch.tensor(
        [[0, 1], [block_size - 1, 2], [5, 3 * block_size], [2, block_size - 2]], dtype=torch.int32
    )
    touched = torch.tensor(
        [[4, -1, -1, -1], [9, 1, -1, -1], [2, 6, 5, 11], [3, -1, -1, -1]], dtype=torch.int32
    )
    expected, actual = case.to("cpu").pools, case.to(kernels).pools
    offsets = plain_offsets(head_dim, block_size)
    index_sentences_reference(expected, rows, spans, touched, offsets, kind)
    index_sentences(actual, rows.to(kernels), spans.to(kernels), touched.to(kernels), kind)
    for name in ("centroids", "spreads"):
        result = getattr(actual, name).cpu()
        torch.testing.assert_close(
            result, getattr(expected, name), rtol=2**-7, atol=1e-6, equal_nan=True
        )
    assert torch.equal(actual.kept.cpu(), expected.kept)


def test_nothing_to_index_is_no_launch(build, kernels):
    from sentencekv_vllm.triton_kernels.index_pages import index_pages
    from sentencekv_vllm.triton_kernels.index_sentences import index_sentences

    case = build(build.row(tokens=64)).to(kernels)
    before = case.to("cpu").pools
    none = torch.empty(0, dtype=torch.int32, device=kernels)
    index_pages(case.pools, none, none)
    index_sentences(case.pools, none, none.reshape(0, 2), none.reshape(0, 1))
    assert torch.equal(case.pools.host.cpu(), before.host)
    assert torch.equal(case.pools.kept.cpu(), before.kept)
