# SPDX-License-Identifier: Apache-2.0
"""The kernels of a decode step and of copy-out, one call each, and the bytes they must move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from gpu_clock import Bandwidth
from gpu_layer import BLOCK, DEVICE, Layer
from gpu_step import Step

from sentencekv_vllm.ops.cuda_layer_ops import CudaOps
from sentencekv_vllm.triton_kernels.locate_sentences import locate_sentences
from sentencekv_vllm.triton_kernels.quantize_query import quantize_query
from sentencekv_vllm.triton_kernels.rank_blocks import rank_blocks
from sentencekv_vllm.triton_kernels.score_blocks import score_blocks
from sentencekv_vllm.triton_kernels.score_sentences import score_sentences
from sentencekv_vllm.triton_kernels.select_blocks import select_blocks
from sentencekv_vllm.types import IndexKind

# The rest is Triton in both; from the masses on, CUDA has one launch for all.
CUDA_KERNELS = (
    *("quantize_query", "score_blocks", "rank_blocks", "score_and_rank"),
    *("select_and_swap_in", "resolve_residency", "swap_in"),
)
OFFLOADED_PAGES = 256  # what one chunk of prefill copies out
SEALED_SENTENCES = 128
SEALED_TOKENS = 28


@dataclass(frozen=True)
class Floor:
    """Bytes that a kernel cannot avoid."""

    memory: float = 0
    to_gpu: float = 0
    to_host: float = 0

    def seconds(self, bandwidth: Bandwidth) -> float:
        """At the speed of plain copies, on each path at once."""
        return max(
            self.memory / bandwidth.memory,
            self.to_gpu / bandwidth.to_gpu,
            self.to_host / bandwidth.to_host,
        )


def offloaded(layer: Layer) -> int:
    return min(OFFLOADED_PAGES, len(layer.pools.cache), len(layer.pools.host))


def sealed(layer: Layer) -> int:
    return min(SEALED_SENTENCES, len(layer.pools.centroids))


def kernels(step: Step) -> dict[str, Callable[[], None]]:
    """Calls on the state that a finished step left, by the name of the op.

    `score_and_rank` is all from the query to the selected blocks.
    """
    layer, work, ops = step.layer, step.work, step.ops
    geometry, pools, batch, query = layer.geometry, layer.pools, layer.batch, layer.query
    centroids = replace(
        batch, index_kind=torch.full_like(batch.index_kind, int(IndexKind.CENTROID))
    )
    blocks = torch.arange(offloaded(layer), dtype=torch.int32, device=DEVICE)
    rows = torch.arange(sealed(layer), dtype=torch.int32, device=DEVICE)
    spans = torch.tensor([[3, SEALED_TOKENS]], dtype=torch.int32, device=DEVICE)
    spans = spans.repeat(len(rows), 1)
    touched = -(-(3 + SEALED_TOKENS) // BLOCK)
    span_blocks = (rows[:, None] + rows[:touched]) % len(pools.cache)
    offset = torch.empty(0)  # GPU blocks hold plain rows
    basis = pools.basis
    assert basis is not None
    of_cuda: dict[str, Callable[[], None]] = {}
    if isinstance(ops, CudaOps):

        def score_and_rank() -> None:
            ops.score(geometry, pools, batch, query)
            ops.rank(geometry, pools, batch)

        of_cuda = {
            "quantize_query": lambda: ops.quantize_query(basis, batch, query),
            "score_blocks": lambda: ops.score_blocks(geometry, pools, batch),
            "rank_blocks": lambda: ops.rank(geometry, pools, batch),
            "score_and_rank": score_and_rank,
            "select_and_swap_in": lambda: ops.select_and_swap_in(geometry, pools, batch, layer.out),
        }
    return {
        "locate_sentences": lambda: locate_sentences(batch, work.first),
        "quantize_query": lambda: quantize_query(geometry, basis, query, work),
        "score_blocks": lambda: score_blocks(geometry, pools, batch, work),
        "rank_blocks": lambda: rank_blocks(geometry, pools, batch, work),
        "score_and_rank": lambda: ops.select(geometry, pools, batch, query),
        "score_centroids": lambda: score_sentences(geometry, pools, centroids, query, work),
        "select_blocks": lambda: select_blocks(geometry, pools, centroids, work),
        "resolve_residency": lambda: ops.resolve_residency(pools, batch, layer.out),
        "swap_in": lambda: ops.swap_in(pools, batch),
        "sparse_decode": step.attend,
        "index_pages": lambda: ops.index_pages(pools, blocks, blocks, offset),
        "index_sentences": lambda: ops.index_sentences(pools, rows, spans, span_blocks, offset),
        **of_cuda,
    }


def floors(layer: Layer, missed: int) -> dict[str, Floor]:
    """The least traffic of each kernel where `missed` blocks a KV head are not resident."""
    requests, heads, dim = layer.requests, layer.geometry.num_kv_heads, layer.geometry.head_dim
    sentences = int(layer.batch.num_sentences.sum())
    blocks = int(layer.batch.num_pages.sum())
    tokens, query = blocks * BLOCK, layer.query.numel()
    masses = 8 * blocks * layer.geometry.num_query_heads
    index = heads * (tokens * (layer.geometry.code_width // 8 + 2) + blocks * (dim + 4))
    query_map = 4 * heads * dim * dim
    offloaded_bytes = offloaded(layer) * heads * layer.head_block_bytes
    return {
        "locate_sentences": Floor(4 * (sentences + tokens // BLOCK)),
        "quantize_query": Floor(query_map + 4 * query),
        "score_blocks": Floor(index + masses),
        "rank_blocks": Floor(masses),
        "score_and_rank": Floor(query_map + index + 2 * masses),
        "select_and_swap_in": Floor(
            masses, to_gpu=requests * heads * missed * layer.head_block_bytes
        ),
        "score_centroids": Floor(2 * sentences * heads * dim + 8 * heads * sentences),
        "select_blocks": Floor(9 * heads * sentences),
        "resolve_residency": Floor(4 * requests * heads * (4 * layer.budget + layer.working_set)),
        "swap_in": Floor(to_gpu=requests * heads * missed * layer.head_block_bytes),
        "sparse_decode": Floor(layer.out.head_tables.numel() * layer.head_block_bytes),
        "index_pages": Floor(offloaded_bytes, to_host=offloaded_bytes),
        "index_sentences": Floor(2 * sealed(layer) * heads * dim * (SEALED_TOKENS + 1)),
    }
