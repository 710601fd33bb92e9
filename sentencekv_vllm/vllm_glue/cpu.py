# SPDX-License-Identifier: Apache-2.0
"""CPU: vLLM's C++ attention for dense rows and, on per-head tables, for sparse rows."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from ..ops.token_layout import TokenLayout
from ..worker.plan import StepPlan
from ..worker.runtime import Runtime
from .impl import SplitImpl
from .key_layout import cpu_token_layout
from .metadata import SparseCall, SplitBuilder

BASE = CPUAttentionBackend


@dataclass(frozen=True)
class CpuSparseCall(SparseCall):
    """Every KV head of every row is a request of its own to the stock op."""

    query_start_loc: Tensor  # [S * H + 1]
    seq_lens: Tensor  # [S * H]
    scheduler_metadata: Tensor


class MetadataBuilder(SplitBuilder, CPUAttentionMetadataBuilder):
    def sparse_call(self, runtime: Runtime, plan: StepPlan, whole_batch: bool) -> CpuSparseCall:
        geometry = runtime.geometry
        count, heads = len(plan.rows), geometry.num_kv_heads
        seq_lens = plan.seq_lens.repeat_interleave(heads)
        query_start_loc = torch.arange(count * heads + 1, dtype=torch.int32)
        scheduler_metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=count * heads,
            num_heads=geometry.group_size,
            num_kv_heads=1,
            head_dim=geometry.head_dim,
            seq_lens=seq_lens,
            dtype=self.dtype,
            query_start_loc=query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        output = torch.empty(count, geometry.num_query_heads, geometry.head_dim, dtype=self.dtype)
        attention = (query_start_loc, seq_lens, scheduler_metadata)
        return CpuSparseCall(runtime, plan, whole_batch, output, *attention)


class Impl(SplitImpl, CPUAttentionBackendImpl):
    def sparse_rows(
        self, layer: int, query: Tensor, kv_cache: Tensor, call: CpuSparseCall, output: Tensor
    ) -> None:
        query = query.index_select(0, call.plan.tokens)
        tables = call.runtime.rank(call.plan, layer, query)
        self._attend(query, kv_cache, tables, call)
        call.runtime.estimate(
            call.plan, layer, query, tables, call.output, softcap=self.logits_soft_cap or 0.0
        )
        output.index_copy_(0, call.plan.tokens, call.output)

    def _attend(self, query: Tensor, kv_cache: Tensor, tables: Tensor, call: CpuSparseCall) -> None:
        started = time.perf_counter_ns()
        geometry = call.runtime.geometry
        rows, heads, width = tables.shape
        # Each head-block becomes a block of its own: a table per KV head for the stock op.
        head_blocks = kv_cache.view(-1, 1, 2 * geometry.block_size, geometry.head_dim)
        key_cache, value_cache = head_blocks.chunk(2, dim=2)
        per_head = (rows * heads, geometry.group_size, geometry.head_dim)
        ops.cpu_attention_with_kv_cache(
            query=query.view(per_head),
            key_cache=key_cache,
            value_cache=value_cache,
            output=call.output.view(per_head),
            query_start_loc=call.query_start_loc,
            seq_lens=call.seq_lens,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=tables.view(rows * heads, width),
            softcap=self.logits_soft_cap,
            scheduler_metadata=call.scheduler_metadata,
            s_aux=None,
        )
        call.runtime.counters["attend_ns"] += time.perf_counter_ns() - started


def prepare(runtime: Runtime) -> None:
    """Nothing to compile."""


def token_layout(cache: Tensor, layer: Any) -> TokenLayout:
    """Where the tokens lie in a head-block of `cache` [B, H, N, 2D]."""
    _, _, block_size, content = cache.shape
    return cpu_token_layout(block_size, content // 2, cache.dtype, layer.isa)
