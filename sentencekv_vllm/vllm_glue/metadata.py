# SPDX-License-Identifier: Apache-2.0
"""Splits a batch into stock rows and sparse rows, on any platform."""

from __future__ import annotations

from abc import abstractmethod
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from ..worker.observations import Observed
from ..worker.plan import StepPlan
from ..worker.runtime import Runtime
from ..worker.visits import Visits


@dataclass(frozen=True)
class SparseCall:
    """What the sparse rows of a step need in a plan's layers; platforms add their own."""

    runtime: Runtime
    plan: StepPlan
    whole_batch: bool  # row i of the plan is token i of the batch, and there are no others
    output: Tensor  # [>= S, Hq, D]


@dataclass(frozen=True)
class DenseCall:
    """What the stock implementation needs for the dense rows of a step."""

    metadata: Any  # the platform's own
    visits: Visits | None  # histories that its rows attend to and that are on the host

    def of_layer(self, layer: int, kv_cache: Tensor) -> tuple[Tensor, Any]:
        """KV cache and metadata of a layer; what visits is on the device after it."""
        if self.visits is None:
            return kv_cache, self.metadata
        metadata = copy(self.metadata)
        metadata.block_table = self.visits.table(layer)
        return self.visits.whole, metadata


@dataclass(frozen=True)
class Split:
    """The two parts of a step."""

    dense: DenseCall | None  # None: every row is sparse
    sparse: tuple[SparseCall, ...]  # each for its plan's layers, which cover the model's
    observed: Observed | None = None


def current_runtime() -> Runtime | None:
    """This worker's runtime; None in profiling and dummy runs."""
    return get_kv_transfer_group().runtime if has_kv_transfer_group() else None


class SentenceKVMetadata:
    """A step with sparse rows, voting tokens or visits, split in the first layer: only then has
    the V2 runner named the requests of the batch."""

    def __init__(
        self,
        builder: SplitBuilder,
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


class SplitBuilder:
    """Put before a stock metadata builder: that one for dense rows, a plan for sparse ones.

    Any other step gets the stock metadata, built when the stock builder would
    build it, since a full graph replays on its persistent buffers.
    """

    supports_update_block_table = False

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Full graphs of decode steps at most: a sparse row may be part of any other batch, and
        `full_graphs` tells vLLM only that a batch is no plain decode."""
        support = super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]
        return min(support, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, key=lambda s: s.value)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        runtime = current_runtime()
        if runtime is None or not runtime.acts_in_layers:
            return super().build(  # type: ignore[misc]  # the stock builder
                common_prefix_len, common_attn_metadata, fast_build
            )
        return SentenceKVMetadata(self, common_prefix_len, common_attn_metadata)

    def split(self, common_prefix_len: int, common: CommonAttentionMetadata) -> Split:
        runtime = current_runtime()
        assert runtime is not None, "metadata of a split step outlived its worker"
        n = common.num_reqs
        starts = common.query_start_loc_cpu.numpy()[: n + 1].astype(np.int64)
        last_tokens = torch.from_numpy(starts[1:] - 1)
        num_requests = np.count_nonzero(starts[1:] > starts[:-1])  # the others pad a graph's size
        observed = runtime.observed(common.slot_mapping, last_tokens)
        plans = runtime.plan(common.block_table_tensor, common.slot_mapping, last_tokens)
        if not plans:
            return Split(self._dense_call(common_prefix_len, common, last_tokens), (), observed)
        dense, rows = None, plans[0].rows  # the same in all
        whole_batch = len(rows) == num_requests
        if not whole_batch:
            dense = self._dense_call(common_prefix_len, _without(common, rows), last_tokens)
        calls = (self.sparse_call(runtime, plan, whole_batch) for plan in plans)
        return Split(dense, tuple(calls), observed)

    def _dense_call(
        self, common_prefix_len: int, common: CommonAttentionMetadata, last_tokens: Tensor
    ) -> DenseCall:
        metadata = super().build(common_prefix_len, common)  # type: ignore[misc]  # the stock one
        runtime = current_runtime()
        assert runtime is not None, "metadata of a split step outlived its worker"
        return DenseCall(
            metadata, runtime.visits(metadata.block_table, common.slot_mapping, last_tokens)
        )

    @abstractmethod
    def sparse_call(self, runtime: Runtime, plan: StepPlan, whole_batch: bool) -> SparseCall:
        """Prepare the attention op of the sparse rows, once a plan."""


def _without(common: CommonAttentionMetadata, rows: Tensor) -> CommonAttentionMetadata:
    """The batch with the given rows reduced to one token of the null block.

    Their tables hold ids of freed blocks, which may be another request's by now.
    """
    masked = copy(common)
    masked.seq_lens = common.seq_lens.index_fill(0, rows, 1)
    masked.block_table_tensor = common.block_table_tensor.index_fill(0, rows, 0)
    return masked
