# SPDX-License-Identifier: Apache-2.0
"""Scattered copies over the bus, in pieces of one size, against one plain copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from gpu_layer import DEVICE
from gpu_step import implementations

from sentencekv_vllm.ops import custom_ops as custom_ops  # registers torch.ops.sentencekv
from sentencekv_vllm.triton_kernels.swap_blocks import swap_in
from sentencekv_vllm.types import LayerPools

PIECES = (512, 8 * 1024, 112 * 1024)  # bytes of a head-block
HEADS = 8
TOKEN_BYTES = 512  # K and V of 128 channels in bf16
TARGET_BYTES = 64 * 2**20
POOL_FACTOR = 4  # the pool is that much larger than what is copied


class Transfer:
    """TARGET_BYTES of head-blocks, a random choice out of a pinned pool, to random slots."""

    def __init__(self, piece_bytes: int) -> None:
        tokens, width = piece_bytes // TOKEN_BYTES, TOKEN_BYTES // 2
        self._per_head = TARGET_BYTES // piece_bytes // HEADS
        self.total_bytes = self._per_head * HEADS * piece_bytes
        shape = (self._per_head, HEADS, tokens, width)
        self._cache = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE)
        self._host = torch.zeros(
            (POOL_FACTOR * shape[0], *shape[1:]), dtype=torch.bfloat16, pin_memory=DEVICE == "cuda"
        )
        generator = torch.Generator().manual_seed(piece_bytes)
        per_head = [
            torch.stack((
                torch.randperm(len(self._host), generator=generator)[: self._per_head],
                torch.full((self._per_head,), head),
                torch.randperm(self._per_head, generator=generator),
            ), -1)
            for head in range(HEADS)
        ]  # fmt: skip
        self._misses = torch.stack(per_head).int()[None].to(DEVICE)  # [1, H, K, 3]
        self._counts = torch.full((1, HEADS), self._per_head, dtype=torch.int32, device=DEVICE)
        blocks = torch.arange(self._per_head)
        pages = torch.randperm(len(self._host), generator=generator)[: self._per_head]
        self._pairs = torch.stack((blocks, pages), -1).int()  # whole pages, cache to pool

    def calls(self) -> Iterator[tuple[str, str, Callable[[], object], bool]]:
        """(case, implementation, call, whether a graph may hold it)."""
        host, cache = self._host, self._cache
        unused = torch.empty(0)
        pools = LayerPools(cache, host, *[unused] * 3)
        rows, count = self._misses.view(-1, 3), self._counts.sum(dtype=torch.int32)[None]
        plain = host[: len(cache)]
        yield "gather", "plain copy", lambda: cache.copy_(plain, non_blocking=True), True
        yield "gather", "Triton", lambda: swap_in(pools, rows, count), True
        yield "offload", "plain copy", lambda: plain.copy_(cache, non_blocking=True), True
        if "CUDA" not in implementations():
            return
        ops, misses, counts = torch.ops.sentencekv, self._misses, self._counts
        pairs, listed = self._pairs, self._pairs.to(DEVICE)
        yield "gather", "CUDA", lambda: ops.gather_misses(host, cache, misses, counts), True
        yield "offload", "CUDA", lambda: ops.copy_pages(cache, host, listed), True
        yield "offload", "copy engines", lambda: ops.copy_page_runs(cache, host, pairs), False
