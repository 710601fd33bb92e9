# SPDX-License-Identifier: Apache-2.0
"""Pools beyond 2^31 elements: a million tokens of context need 64-bit addresses.

Memory that is never touched costs nothing, so the pools are far larger than the machine.
"""

from dataclasses import replace

import pytest
import torch

from sentencekv_vllm.ops.basis import plain_basis
from sentencekv_vllm.ops.pack_keys import pack_keys, unpack_signs
from sentencekv_vllm.types import LayerPools

HEADS, N, D, M = 2, 16, 64, 20
FAR = 2**32 // (HEADS * N * 2 * D) + 7  # past 2^31 elements, also of 32-bit words


def reserve(*shape, dtype=torch.bfloat16):
    """An uninitialised tensor whose pages get memory when they are first written."""
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"cannot reserve address space: {error}")


@pytest.fixture
def on_cpu(kernels):
    if kernels != "cpu":
        pytest.skip("on a GPU such pools would be resident: the interpreter shows the addresses")


@pytest.fixture
def far_pools(on_cpu):
    return LayerPools(
        cache=reserve(FAR + 1, HEADS, N, 2 * D),
        host=reserve(FAR + 1, HEADS, N, 2 * D),
        codes=torch.zeros(FAR + 1, HEADS, D // 8, N, dtype=torch.uint8),
        means=reserve(FAR + 1, HEADS, D, dtype=torch.int8),
        mean_scales=reserve(FAR + 1, HEADS, dtype=torch.float32),
        page_kept=reserve(FAR + 1, HEADS, dtype=torch.uint8),
        basis=plain_basis(HEADS, D, D),
        scales=torch.zeros(FAR + 1, HEADS, N, dtype=torch.bfloat16),
        centroids=reserve((FAR + 1) * M, HEADS, D),
        kept=torch.zeros((FAR + 1) * M, HEADS, dtype=torch.uint8),
        page_slot=torch.full((FAR + 1, HEADS), -1, dtype=torch.int32),
        slot_page=torch.full((FAR + 1, HEADS), -1, dtype=torch.int32),
        slot_stamp=torch.full((FAR + 1, HEADS), -1, dtype=torch.int32),
    )


def test_far_pages_are_written_and_read_back(far_pools):
    from sentencekv_vllm.triton_kernels.index_pages import index_pages
    from sentencekv_vllm.triton_kernels.swap_blocks import swap_in

    far_pools.cache[FAR] = torch.randn(HEADS, N, 2 * D)
    block = page = torch.tensor([FAR], dtype=torch.int32)
    index_pages(far_pools, block, page)
    assert torch.equal(far_pools.host[FAR], far_pools.cache[FAR])
    packed = pack_keys(far_pools.cache[FAR, :, :, :D], far_pools.basis, D)
    same = unpack_signs(far_pools.codes[FAR]) == unpack_signs(packed.codes)
    assert same.float().mean() > 0.99, "but for channels that two orders of summation tell apart"
    torch.testing.assert_close(far_pools.mean_scales[FAR], packed.mean_scales)
    assert not bool(far_pools.page_kept[FAR].any())

    misses = torch.tensor([[FAR, 1, FAR - 1]], dtype=torch.int32)
    swap_in(far_pools, misses, torch.tensor([1], dtype=torch.int32))
    assert torch.equal(far_pools.cache[FAR - 1, 1], far_pools.host[FAR, 1])


def test_far_sentences_are_indexed(far_pools):
    from sentencekv_vllm.triton_kernels.index_sentences import index_sentences

    far_pools.cache[FAR, :, :, :D] = torch.randn(HEADS, N, D)
    row = FAR * M + 3
    far_pools.kept[row] = 1
    index_sentences(
        far_pools,
        torch.tensor([row], dtype=torch.int32),
        torch.tensor([[2, 9]], dtype=torch.int32),
        torch.tensor([[FAR]], dtype=torch.int32),
    )
    mean = far_pools.cache[FAR, :, 2:11, :D].float().mean(1)
    torch.testing.assert_close(far_pools.centroids[row].float(), mean, rtol=2**-7, atol=1e-6)
    assert not bool(far_pools.kept[row].any())


def test_far_head_blocks_are_attended(far_pools):
    from sentencekv_vllm.triton_kernels.sparse_decode import DecodeScratch, sparse_decode

    far_pools.cache[FAR] = torch.randn(HEADS, N, 2 * D)
    query = torch.randn(1, HEADS, D).bfloat16()
    tables = (torch.tensor([[[FAR], [FAR]]]) * HEADS + torch.tensor([[[0], [1]]])).int()
    output, lse = torch.empty_like(query), torch.empty(1, HEADS)
    keys, values = far_pools.cache.split(D, -1)
    lengths = torch.tensor([N], dtype=torch.int32)
    scratch = DecodeScratch.allocate(1, HEADS, D, N, torch.device("cpu"))
    sparse_decode(query, keys, values, tables, lengths, 0.125, scratch, output, lse)
    near = far_pools.cache[FAR].float()
    weights = (0.125 * near[..., :D] @ query[0].float()[..., None]).softmax(1)
    expected = (weights * near[..., D:]).sum(1)
    torch.testing.assert_close(output[0].float(), expected, rtol=0, atol=2e-2)


def test_far_pages_are_ranked(on_cpu, build, workspace):
    """The same pages far away in the pools of codes have the same masses and ranks."""
    from sentencekv_vllm.triton_kernels.quantize_query import quantize_query
    from sentencekv_vllm.triton_kernels.rank_blocks import rank_blocks
    from sentencekv_vllm.triton_kernels.score_blocks import score_blocks

    case = build(build.row(tokens=320), head_dim=D)
    codes = case.pools.codes
    far = 2**31 // (codes[0].numel()) + 5
    pages, count = case.batch.pages[0].long(), int(case.batch.num_pages[0])
    moved = {}
    for name in ("codes", "scales", "means", "mean_scales", "page_kept"):
        near = getattr(case.pools, name)
        moved[name] = reserve(far + 400, *near.shape[1:], dtype=near.dtype)
        moved[name][far + pages] = near[pages]
    away = replace(
        case,
        pools=replace(case.pools, **moved),
        batch=replace(case.batch, pages=case.batch.pages + far),
    )
    results = []
    for one in (case, away):
        work = workspace(case, "cpu")
        quantize_query(one.geometry, one.pools.basis, one.query, work)
        score_blocks(one.geometry, one.pools, one.batch, work)
        rank_blocks(one.geometry, one.pools, one.batch, work)
        tops, sums = work.tops[0, ..., :count], work.sums[0, ..., :count]
        results.append((tops, sums, work.blocks, work.coverage[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(away.pools.page_kept[far + pages], case.pools.page_kept[pages])
