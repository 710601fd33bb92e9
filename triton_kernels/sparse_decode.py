# SPDX-License-Identifier: Apache-2.0
"""Sparse paged decode attention with a block table per KV head.

Split-K: each program attends to SPLIT consecutive tokens of one KV head for all its query
heads, and a second kernel merges the parts by log-sum-exp (merged by the last program to end,
without a second launch, they took 4 us longer). The grid depends on shapes alone, and a row's
parts on its length alone: its result does not change with its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLIT = 128  # tokens a program attends to
TILE_NUMEL = 128 * 128  # of keys in flight, and of values: two programs fit a multiprocessor
PARTS = 16  # splits that are merged at a time


@dataclass(frozen=True)
class DecodeScratch:
    """What the splits hand to the merge."""

    parts: Tensor  # [S, Hq, splits, D] float32: output of each split
    part_lse: Tensor  # [S, Hq, splits] float32

    @staticmethod
    def allocate(
        max_requests: int,
        num_query_heads: int,
        head_dim: int,
        max_tokens: int,
        device: torch.device,
    ) -> DecodeScratch:
        """Scratch for tables of up to `max_tokens` tokens, that is W * N."""
        shape = (max_requests, num_query_heads, -(-max_tokens // SPLIT))
        return DecodeScratch(
            torch.empty(*shape, head_dim, device=device), torch.empty(shape, device=device)
        )


@triton.jit(do_not_specialize=["tables_request_stride", "tables_head_stride", "num_splits"])
def _attend_split(
    query,
    key_cache,
    value_cache,
    head_tables,
    seq_lens,
    parts,
    part_lse,
    scale,
    tables_request_stride,
    tables_head_stride,
    key_block_stride,
    key_head_stride,
    key_token_stride,
    value_block_stride,
    value_head_stride,
    value_token_stride,
    num_splits,
    H: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    N: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
):
    split = tl.program_id(0)
    s = tl.program_id(1)
    h = tl.program_id(2)
    length = tl.load(seq_lens + s)
    if split * SPLIT >= length:
        return
    head = s.to(tl.int64) * H + h
    g = tl.arange(0, G_PAD)
    d = tl.arange(0, D_PAD)
    mask_q = (g < G)[:, None] & (d < D)[None, :]
    q = tl.load(query + (head * G + g)[:, None] * D + d[None, :], mask=mask_q, other=0.0)
    table = head_tables + s.to(tl.int64) * tables_request_stride
    table += h.to(tl.int64) * tables_head_stride
    key_cache += h.to(tl.int64) * key_head_stride
    value_cache += h.to(tl.int64) * value_head_stride

    top = tl.full((G_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((G_PAD,), tl.float32)
    output = tl.zeros((G_PAD, D_PAD), tl.float32)
    for begin in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, length), TILE):
        token = begin + tl.arange(0, TILE)
        valid = token < length
        block = (tl.load(table + token // N, mask=valid, other=0) // H).to(tl.int64)
        key = key_cache + block * key_block_stride + (token % N) * key_token_stride
        value = value_cache + block * value_block_stride + (token % N) * value_token_stride
        k = tl.load(key[None, :] + d[:, None], mask=valid[None, :] & (d < D)[:, None], other=0.0)
        v = tl.load(value[:, None] + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)
        # Base 2: exp2 is one instruction.
        logits = tl.dot(q, k) * (scale * 1.4426950408889634)
        logits = tl.where(valid[None, :], logits, float("-inf"))
        raised = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - raised[:, None])
        fade = tl.exp2(top - raised)
        total = total * fade + tl.sum(weights, 1)
        output = tl.dot(weights.to(v.dtype), v, output * fade[:, None])
        top = raised

    row = (head * G + g) * num_splits + split
    tl.store(parts + row[:, None] * D + d[None, :], output / total[:, None], mask=mask_q)
    tl.store(part_lse + row, (top + tl.log2(total)) * 0.6931471805599453, mask=g < G)


@triton.jit(do_not_specialize=["num_splits"])
def _merge_splits(
    parts,
    part_lse,
    seq_lens,
    output,
    lse,
    num_splits,
    HQ: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
):
    s = tl.program_id(0)
    head = s.to(tl.int64) * HQ + tl.program_id(1)
    d = tl.arange(0, D_PAD)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    merged = tl.zeros((D_PAD,), tl.float32)
    count = tl.cdiv(tl.load(seq_lens + s), SPLIT)
    for begin in range(0, count, PARTS):
        split = begin + tl.arange(0, PARTS)
        row = head * num_splits + split
        mask = (split < count)[:, None] & (d < D)[None, :]
        part_top = tl.load(part_lse + row, mask=split < count, other=float("-inf"))
        part = tl.load(parts + row[:, None] * D + d[None, :], mask=mask, other=0.0)
        raised = tl.maximum(top, tl.max(part_top, 0))
        fade = tl.exp(top - raised)
        weights = tl.exp(part_top - raised)
        merged = merged * fade + tl.sum(part * weights[:, None], 0)
        total = total * fade + tl.sum(weights, 0)
        top = raised
    result = tl.where(total > 0, merged / total, 0.0)
    tl.store(output + head * D + d, result.to(output.dtype.element_ty), mask=d < D)
    tl.store(lse + head, top + tl.log(total))


def sparse_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    head_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    scratch: DecodeScratch,
    output: Tensor,
    lse: Tensor,
) -> None:
    """`ops.sparse_decode` into the caller's buffers; a row of length 0 gives 0 and -inf.

    Args:
        query: [S, H * G, D] contiguous, bf16 or fp16 like the cache.
        key_cache, value_cache: [B, H, N, D] views, channels adjacent.
        head_tables: [S, H, W] int32, last dimension adjacent; unread entries may be anything.
        seq_lens: [S] int32, at most W * N.
        scratch: for at least S requests and W * N tokens.
        output: [S, H * G, D] contiguous, written, like the query.
        lse: [S, H * G] float32, contiguous, written.

    Raises:
        TypeError: another dtype than bf16 or fp16, or two of them.
    """
    if query.dtype not in (torch.bfloat16, torch.float16) or query.dtype != key_cache.dtype:
        raise TypeError(
            f"query ({query.dtype}) and cache ({key_cache.dtype}) must share bf16 or fp16: "
            "serve the model in one of them"
        )
    requests, num_query_heads, dim = query.shape
    _, heads, n, _ = key_cache.shape
    width = head_tables.shape[2]
    assert key_cache.stride(3) == value_cache.stride(3) == head_tables.stride(2) == 1
    assert query.is_contiguous() and output.is_contiguous() and lse.is_contiguous()
    num_splits = scratch.part_lse.shape[2]
    splits = triton.cdiv(width * n, SPLIT)
    assert splits <= num_splits, f"tables of {width * n} tokens, scratch for {num_splits * SPLIT}"
    group = num_query_heads // heads
    d_pad = triton.next_power_of_2(dim)
    _attend_split[(splits, requests, heads)](
        query,
        key_cache,
        value_cache,
        head_tables,
        seq_lens,
        scratch.parts,
        scratch.part_lse,
        scale,
        head_tables.stride(0),
        head_tables.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        value_cache.stride(0),
        value_cache.stride(1),
        value_cache.stride(2),
        num_splits,
        H=heads,
        G=group,
        G_PAD=max(16, triton.next_power_of_2(group)),
        D=dim,
        D_PAD=d_pad,
        N=n,
        SPLIT=SPLIT,
        TILE=min(SPLIT, TILE_NUMEL // d_pad),
        num_warps=8,
        num_stages=2,
    )
    _merge_splits[(requests, num_query_heads)](
        scratch.parts,
        scratch.part_lse,
        seq_lens,
        output,
        lse,
        num_splits,
        HQ=num_query_heads,
        D=dim,
        D_PAD=d_pad,
        SPLIT=SPLIT,
        PARTS=PARTS,
        num_warps=4,
    )
