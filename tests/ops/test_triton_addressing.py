# SPDX-License-Identifier: Apache-2.0
"""Pools beyond 2^31 elements: a million tokens of context need 64-bit addresses.

Memory that is never touched costs nothing, so the pools are far larger than the machine.
"""

from dataclasses import replace

import pytest
import torch

from sentencekv_vllm.ops.pack_keys import pack_keys
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
        bits=torch.zeros(FAR + 1, HEADS, D // 8, N, dtype=torch.uint8),
        scales=torch.zeros(FAR + 1, HEADS, N, dtype=torch.bfloat16),
        centroids=reserve((FAR + 1) * M, HEADS, D),
        kept=torch.zeros((FAR + 1) * M, HEADS, dtype=torch.uint8),
        page_slot=torch.full((FAR + 1, HEADS), -1, dtype=torch.int32),
        slot_page=torch.full((FAR + 1, HEADS), -1, dtype=torch.int32),
        slot_stamp=torch.full((FAR + 1, HEADS), -1, dtype=torch.int32),
    )


def test_far_pages_are_written_and_read_back(far_pools, build):
    from sentencekv_vllm.triton_kernels.index_pages import index_pages
    from sentencekv_vllm.triton_kernels.swap_blocks import swap_in

    turn = build(build.row(tokens=0), head_dim=D).rotation
    far_pools.cache[FAR] = torch.randn(HEADS, N, 2 * D)
    block = page = torch.tensor([FAR], dtype=torch.int32)
    index_pages(far_pools, block, page, turn)
    assert torch.equal(far_pools.host[FAR], far_pools.cache[FAR])
    bits, _ = pack_keys(far_pools.cache[FAR, :, :, :D], turn)
    assert torch.equal(far_pools.bits[FAR], bits)

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


def test_far_pages_are_scored(on_cpu, build, workspace):
    """The same pages far away in the pool of sign bits have the same scores."""
    from sentencekv_vllm.triton_kernels.locate_sentences import locate_sentences
    from sentencekv_vllm.triton_kernels.quantize_query import quantize_query
    from sentencekv_vllm.triton_kernels.score_sentences import score_sentences

    case = build(build.row(tokens=320), head_dim=D)
    far = 2**31 // (HEADS * D // 8 * N) + 5
    pages = case.batch.pages[0].long()
    pools = replace(
        case.pools,
        bits=reserve(far + 400, HEADS, D // 8, N, dtype=torch.uint8),
        scales=reserve(far + 400, HEADS, N),
    )
    pools.bits[far + pages] = case.pools.bits[pages]
    pools.scales[far + pages] = case.pools.scales[pages]
    moved = replace(case, pools=pools, batch=replace(case.batch, pages=case.batch.pages + far))
    results = []
    for one in (case, moved):
        work = workspace(case, "cpu")
        locate_sentences(one.batch, work.first)
        quantize_query(one.query, one.rotation, work.levels, work.steps)
        score_sentences(one.geometry, one.pools, one.batch, one.query, work)
        results.append(work.scores[0, :, : int(case.batch.num_sentences[0])])
    assert torch.equal(*results)
