# SPDX-License-Identifier: Apache-2.0
"""Copy-out, sign bits, scales and centroids equal their definitions."""

import pytest
import torch

from sentencekv_vllm.ops.index_pages import index_pages as index_pages_reference
from sentencekv_vllm.ops.index_sentences import index_sentences as index_sentences_reference
from sentencekv_vllm.types import IndexKind

SHAPES = [(64, 16), (80, 48), (96, 64), (128, 32), (256, 16)]
SMALLER = [(128, 64, 32), (128, 24, 16), (80, 40, 48)]  # head_dim, index_dim, block_size


def plain_offsets(head_dim, block_size):
    token = torch.arange(block_size, dtype=torch.int32)[:, None]
    return (token * 2 * head_dim + torch.arange(head_dim, dtype=torch.int32)).flatten()


def fill_cache(case):
    case.pools.cache.copy_(torch.randn(case.pools.cache.shape))
    case.pools.cache[:, :, :, case.geometry.head_dim :][0] = float("nan")  # V is only copied
    case.pools.cache[1, 0, 3, : case.geometry.head_dim] = 0  # a zero key has scale 0


@pytest.mark.parametrize(
    ("head_dim", "index_dim", "block_size"), [*((d, d, n) for d, n in SHAPES), *SMALLER]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pages_are_byte_copies_with_the_bits_of_their_keys(
    build, kernels, head_dim, index_dim, block_size, dtype
):
    from sentencekv_vllm.triton_kernels.index_pages import index_pages

    case = build(
        build.row(tokens=7 * block_size),
        head_dim=head_dim,
        index_dim=index_dim,
        block_size=block_size,
        dtype=dtype,
    )
    fill_cache(case)
    case.pools.page_slot.fill_(3)
    blocks = torch.tensor([0, 5, 1, 9, 2], dtype=torch.int32)
    pages = torch.tensor([6, 0, 3, 8, 4], dtype=torch.int32)
    expected, actual = case.to("cpu").pools, case.to(kernels)
    offsets = plain_offsets(head_dim, block_size)
    index_pages_reference(expected, blocks, pages, offsets, case.rotation)
    index_pages(actual.pools, blocks.to(kernels), pages.to(kernels), actual.rotation)

    result = actual.to("cpu").pools
    assert torch.equal(result.host.view(torch.int16), expected.host.view(torch.int16))
    assert torch.equal(result.page_slot, expected.page_slot)
    torch.testing.assert_close(result.scales, expected.scales, rtol=2**-7, atol=0, equal_nan=True)
    # A sign may differ only where the rotated channel is lost in rounding.
    rotated = (expected.host[..., :head_dim].float() @ case.rotation).transpose(-1, -2)
    flipped = (result.bits ^ expected.bits)[pages.long()]
    shifts = torch.arange(8, dtype=torch.uint8)
    differs = ((flipped.unsqueeze(-2) >> shifts[:, None]) & 1).flatten(-3, -2).bool()
    assert not bool((differs & (rotated[pages.long()].abs() > 1e-5)).any())
    untouched = torch.ones(len(result.bits), dtype=torch.bool)
    untouched[pages.long()] = False
    assert torch.equal(result.bits[untouched], expected.bits[untouched])


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
    index_pages_reference(expected, blocks, pages, offsets, case.rotation)
    index_pages(actual.pools, blocks.to(kernels), pages.to(kernels), actual.rotation)
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
    index_pages(case.pools, none, none, case.rotation)
    index_sentences(case.pools, none, none.reshape(0, 2), none.reshape(0, 1))
    assert torch.equal(case.pools.host.cpu(), before.host)
    assert torch.equal(case.pools.kept.cpu(), before.kept)
