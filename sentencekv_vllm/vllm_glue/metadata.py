# SPDX-License-Identifier: Apache-2.0
"""Splits a batch into stock rows and sparse rows."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, CPUAttentionMetadataBuilder

from ..worker.plan import StepPlan
from ..worker.runtime import Runtime


@dataclass(frozen=True)
class SparseCall:
    """Arguments of the attention op for the sparse rows, the same in every layer."""

    runtime: Runtime
    plan: StepPlan
    query_start_loc: Tensor  # [S * H + 1]
    seq_lens: Tensor  # [S * H]
    scheduler_metadata: Tensor
    output: Tensor  # [S, Hq, D]


@dataclass(frozen=True)
class Split:
    """The two parts of a step."""

    dense: CPUAttentionMetadata | None  # None: every row is sparse
    sparse: SparseCall | None


class SentenceKVMetadata:
    """Built lazily in the first layer: the V2 runner builds metadata before the connector
    has the step's message."""

    def __init__(
        self,
        builder: SentenceKVMetadataBuilder,
        common_prefix_len: int,
        common: CommonAttentionMetadata,
    ) -> None:
        self._builder = builder
        self._common_prefix_len = common_prefix_len
        self._common = common
        self.num_actual_tokens: int = common.num_actual_tokens
        self.slot_mapping: Tensor = common.slot_mapping

    @cached_property
    def split(self) -> Split:
        return self._builder.split(self._common_prefix_len, self._common)


class SentenceKVMetadataBuilder(CPUAttentionMetadataBuilder):
    """The stock builder for dense rows, and a plan for the sparse ones."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SentenceKVMetadata:
        return SentenceKVMetadata(self, common_prefix_len, common_attn_metadata)

    def split(self, common_prefix_len: int, common: CommonAttentionMetadata) -> Split:
        runtime = get_kv_transfer_group().runtime if has_kv_transfer_group() else None
        plan = self._plan(runtime, common) if runtime is not None else None
        if runtime is None or plan is None:
            return Split(super().build(common_prefix_len, common), None)
        dense = None
        if len(plan.rows) < common.num_reqs:
            dense = super().build(common_prefix_len, self._without(common, plan.rows))
        return Split(dense, self._sparse_call(runtime, plan))

    @staticmethod
    def _plan(runtime: Runtime, common: CommonAttentionMetadata) -> StepPlan | None:
        if not runtime.has_sparse_rows:
            return None
        n = common.num_reqs
        last = common.query_start_loc[1 : n + 1].long() - 1
        return runtime.plan(
            tail_blocks=common.slot_mapping[last] // runtime.geometry.block_size,
            block_table=common.block_table_tensor[:n],
            seq_lens=common.seq_lens[:n],
            tokens=last,
        )

    @staticmethod
    def _without(common: CommonAttentionMetadata, rows: Tensor) -> CommonAttentionMetadata:
        """The batch with the given rows reduced to one token of the null block.

        Their tables hold ids of freed blocks, which may be another request's by now.
        """
        masked = copy(common)
        masked.seq_lens = common.seq_lens.clone()
        masked.seq_lens[rows] = 1
        masked.block_table_tensor = common.block_table_tensor.clone()
        masked.block_table_tensor[rows] = 0
        return masked

    def _sparse_call(self, runtime: Runtime, plan: StepPlan) -> SparseCall:
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
        return SparseCall(runtime, plan, query_start_loc, seq_lens, scheduler_metadata, output)
