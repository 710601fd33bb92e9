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
from sentencekv_vllm.triton_kernels.score_sentences import score_sentences
from sentencekv_vllm.triton_kernels.select_blocks import select_blocks
from sentencekv_vllm.types import IndexKind

# The rest is Triton in both; from the logits on, CUDA has one launch for all.
CUDA_KERNELS = ("score_tokens", "select_and_swap_in", "resolve_residency", "swap_in")
EMPTIES_LOGITS = ("select_and_swap_in",)
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
    """Calls on the state that a finished step left, by the name of the op."""
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
    of_cuda: dict[str, Callable[[], None]] = {}
    if isinstance(ops, CudaOps):
        of_cuda = {
            "score_tokens": lambda: ops.score(geometry, pools, batch, query, layer.rotation),
            "select_and_swap_in": lambda: ops.select_and_swap_in(geometry, pools, batch, layer.out),
        }
    return {
        **of_cuda,
        "locate_sentences": lambda: locate_sentences(batch, work.first),
        "quantize_query": lambda: quantize_query(query, layer.rotation, work.levels, work.steps),
        "score_sentences": lambda: score_sentences(geometry, pools, batch, query, work),
        "score_centroids": lambda: score_sentences(geometry, pools, centroids, query, work),
        "select_blocks": lambda: select_blocks(geometry, pools, batch, work),
        "resolve_residency": lambda: ops.resolve_residency(pools, batch, layer.out),
        "swap_in": lambda: ops.swap_in(pools, batch),
        "sparse_decode": step.attend,
        "index_pages": lambda: ops.index_pages(pools, blocks, blocks, offset, layer.rotation),
        "index_sentences": lambda: ops.index_sentences(pools, rows, spans, span_blocks, offset),
    }


def floors(layer: Layer, missed: int) -> dict[str, Floor]:
    """The least traffic of each kernel where `missed` blocks a KV head are not resident."""
    requests, heads, dim = layer.requests, layer.geometry.num_kv_heads, layer.geometry.head_dim
    sentences = int(layer.batch.num_sentences.sum())
    tokens = int(layer.batch.num_pages.sum()) * BLOCK
    query = layer.query.numel()
    offloaded_bytes = offloaded(layer) * heads * layer.head_block_bytes
    return {
        "locate_sentences": Floor(4 * (sentences + tokens // BLOCK)),
        "quantize_query": Floor(3 * query),
        "score_tokens": Floor(tokens * heads * (dim // 8 + 2)),
        "select_and_swap_in": Floor(
            17 * heads * sentences, to_gpu=requests * heads * missed * layer.head_block_bytes
        ),
        "score_sentences": Floor(tokens * heads * (dim // 8 + 2) + 8 * heads * sentences),
        "score_centroids": Floor(2 * sentences * heads * dim + 8 * heads * sentences),
        "select_blocks": Floor(9 * heads * sentences),
        "resolve_residency": Floor(4 * requests * heads * (4 * layer.budget + layer.working_set)),
        "swap_in": Floor(to_gpu=requests * heads * missed * layer.head_block_bytes),
        "sparse_decode": Floor(layer.out.head_tables.numel() * layer.head_block_bytes),
        "index_pages": Floor(offloaded_bytes, to_host=offloaded_bytes),
        "index_sentences": Floor(2 * sealed(layer) * heads * dim * (SEALED_TOKENS + 1)),
    }
