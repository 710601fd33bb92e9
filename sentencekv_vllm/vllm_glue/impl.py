# SPDX-License-Identifier: Apache-2.0
"""One attention layer: stock attention for dense rows, ranked sentences for sparse rows."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from .metadata import SentenceKVMetadata, SparseCall


class SentenceKVImpl(CPUAttentionBackendImpl):
    """The stock implementation, which writes the KV cache and serves dense rows."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        if alibi_slopes is not None:
            raise ValueError(
                "sentencekv does not support ALiBi: a swapped-in block has no position in its "
                "table. Use another attention backend for this model."
            )
        if kv_sharing_target_layer_name is not None:
            raise ValueError(
                "sentencekv does not support layers that share another layer's KV cache "
                f"(here: {kv_sharing_target_layer_name}). Use another attention backend."
            )
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **extra,
        )

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: SentenceKVMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if attn_metadata is None:  # profiling run
            return output
        split = attn_metadata.split
        if split.dense is not None:
            super().forward(layer, query, key, value, kv_cache, split.dense, output)
        if split.sparse is not None:
            self._sparse_rows(layer.layer_name, query, kv_cache, split.sparse, output)
        return output

    def _sparse_rows(
        self, layer_name: str, query: Tensor, kv_cache: Tensor, call: SparseCall, output: Tensor
    ) -> None:
        runtime, plan, geometry = call.runtime, call.plan, call.runtime.geometry
        query = query[plan.tokens]
        tables = runtime.rank(plan, runtime.layer_index[layer_name], query)
        started = time.perf_counter_ns()
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
        output.view(-1, geometry.num_query_heads, geometry.head_dim)[plan.tokens] = call.output
        runtime.counters["attend_ns"] += time.perf_counter_ns() - started
