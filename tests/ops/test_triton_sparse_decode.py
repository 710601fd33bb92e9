# SPDX-License-Identifier: Apache-2.0
"""Sparse paged attention equals its definition, whatever lies in memory it must not read."""

import math

import pytest
import torch

from sentencekv_vllm.ops.sparse_decode import sparse_decode as sparse_decode_reference

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


def draw(lengths, heads, group, head_dim, block_size, dtype, seed=0):
    """A poisoned cache in which the tables of every row and KV head own random blocks."""
    generator = torch.Generator().manual_seed(seed)
    width = max(1, -(-max(lengths) // block_size)) + 1
    num_blocks = len(lengths) * width + 2
    cache = torch.full((num_blocks, heads, block_size, 2 * head_dim), float("nan"), dtype=dtype)
    tables = torch.full((len(lengths), heads, width), -1, dtype=torch.int32)
    for h in range(heads):
        order = torch.randperm(num_blocks, generator=generator)
        for s, length in enumerate(lengths):
            for j in range(-(-length // block_size)):
                block = int(order[s * width + j])
                filled = min(block_size, length - j * block_size)
                content = torch.randn(filled, 2 * head_dim, generator=generator)
                cache[block, h, :filled] = content.to(dtype)
                tables[s, h, j] = block * heads + h
    query = torch.randn(len(lengths), heads * group, head_dim, generator=generator).to(dtype)
    return query, cache, tables, torch.tensor(lengths, dtype=torch.int32)


def run(query, cache, tables, lengths, device):
    from sentencekv_vllm.triton_kernels.sparse_decode import DecodeScratch, sparse_decode

    requests, num_query_heads, dim = query.shape
    tokens = tables.shape[2] * cache.shape[2]
    scratch = DecodeScratch.allocate(requests, num_query_heads, dim, tokens + 300, device)
    scratch.parts.fill_(float("nan"))
    scratch.part_lse.fill_(float("nan"))
    output = torch.full_like(query, float("nan"), device=device)
    lse = torch.full((requests, num_query_heads), float("nan"), device=device)
    keys, values = cache.to(device).split(dim, -1)
    sparse_decode(
        query.to(device),
        keys,
        values,
        tables.to(device),
        lengths.to(device),
        dim**-0.5,
        scratch,
        output,
        lse,
    )
    return output.cpu(), lse.cpu()


def check(query, cache, tables, lengths, device):
    output, lse = run(query, cache, tables, lengths, device)
    dim = query.shape[-1]
    keys, values = cache.split(dim, -1)
    some = lengths > 0
    expected, expected_lse = sparse_decode_reference(
        query[some], keys, values, tables[some], lengths[some], dim**-0.5
    )
    torch.testing.assert_close(
        output[some].float(), expected.float(), rtol=0, atol=TOLERANCE[query.dtype]
    )
    torch.testing.assert_close(lse[some], expected_lse, rtol=1e-4, atol=1e-4)
    assert bool((output[~some] == 0).all())
    assert bool((lse[~some] == -math.inf).all())


@pytest.mark.parametrize(
    ("head_dim", "group", "block_size"),
    [(64, 1, 16), (80, 7, 16), (96, 4, 48), (128, 8, 128), (256, 16, 32)],
)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_head_dims_groups_and_blocks(kernels, head_dim, group, block_size, dtype):
    check(*draw([577, 1], 2, group, head_dim, block_size, dtype), kernels)


def test_lengths_around_splits_and_an_empty_row(kernels):
    check(*draw([255, 256, 257, 0, 511, 512, 769, 16], 1, 4, 64, 16, torch.float16), kernels)


def test_a_row_does_not_depend_on_its_batch(kernels):
    query, cache, tables, lengths = draw([577, 300, 40], 2, 4, 64, 16, torch.bfloat16)
    together, lse = run(query, cache, tables, lengths, kernels)
    for s in range(3):
        # A narrower table, a batch of one.
        width = -(-int(lengths[s]) // 16)
        row = slice(s, s + 1)
        alone, alone_lse = run(query[row], cache, tables[row, :, :width], lengths[row], kernels)
        assert torch.equal(alone, together[row])
        assert torch.equal(alone_lse, lse[row])


def test_large_logits_do_not_overflow(kernels):
    query, cache, tables, lengths = draw([577], 1, 4, 64, 16, torch.float16)
    check(query * 60, cache, tables, lengths, kernels)


def test_a_dtype_that_tensor_cores_do_not_take_is_refused(kernels):
    query, cache, tables, lengths = draw([16], 1, 1, 64, 16, torch.float16)
    with pytest.raises(TypeError, match="bf16 or fp16"):
        run(query.float(), cache.float(), tables, lengths, kernels)
    with pytest.raises(TypeError, match="bf16 or fp16"):
        run(query.bfloat16(), cache, tables, lengths, kernels)
