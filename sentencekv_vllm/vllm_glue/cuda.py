# SPDX-License-Identifier: Apache-2.0
"""CUDA: vLLM's FlashAttention or Triton backend for dense rows, our kernel for sparse rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_layout import KVCacheLayout

from ..ops.token_layout import TokenLayout
from ..triton_kernels.sparse_decode import DecodeScratch, sparse_decode
from ..worker.plan import StepPlan
from ..worker.runtime import Runtime
from ..worker.warm_up import warm_up
from .impl import SplitImpl
from .metadata import SparseCall, SplitBuilder

LAYOUT = KVCacheLayout.LBHNC  # head-major: a head-block is contiguous


def stock_backend() -> type[AttentionBackend]:
    """The first of vLLM's backends, in its own order, that works here and takes our layout.

    FlashInfer is left out: it plans on the host from block tables that we mask on the device.
    """
    capability = current_platform.get_device_capability()
    for candidate in (AttentionBackendEnum.FLASH_ATTN, AttentionBackendEnum.TRITON_ATTN):
        try:
            backend: type[AttentionBackend] = candidate.get_class()
        except (ImportError, OSError):
            continue
        layouts = backend.supported_kv_cache_layouts()
        if layouts is not None and LAYOUT not in layouts:
            continue
        if candidate is AttentionBackendEnum.FLASH_ATTN:
            from vllm.v1.attention.backends.fa_utils import is_flash_attn_varlen_func_available

            if not is_flash_attn_varlen_func_available():
                continue
        if capability is None or backend.supports_compute_capability(capability):
            return backend
    raise ValueError(
        f"sentencekv found no attention backend of vLLM for compute capability {capability} that "
        f"reads head-major KV caches ({LAYOUT.name}): use another attention backend"
    )


BASE: Any = stock_backend()


@dataclass(frozen=True)
class CudaSparseCall(SparseCall):
    """Buffers of `sparse_decode`, as persistent as the plan's."""

    query: Tensor  # [>= S, Hq, D]
    scratch: DecodeScratch
    lse: Tensor  # [>= S, Hq] float32


def sparse_call(runtime: Runtime, plan: StepPlan, whole_batch: bool) -> CudaSparseCall:
    """The plan with its buffers, which are made once for all steps on the same tensors."""
    geometry, cache = runtime.geometry, runtime.pools.layers[0].cache
    rows, _, width = plan.out.head_tables.shape
    heads, dim = geometry.num_query_heads, geometry.head_dim

    def buffers() -> tuple[Tensor, Tensor, DecodeScratch, Tensor]:
        output = torch.empty(rows, heads, dim, dtype=cache.dtype, device=cache.device)
        tokens = width * geometry.block_size
        scratch = DecodeScratch.allocate(rows, heads, dim, tokens, cache.device)
        lse = torch.empty(rows, heads, device=cache.device)
        return output, torch.empty_like(output), scratch, lse

    output, query, scratch, lse = plan.graphs.once("attention", buffers)
    return CudaSparseCall(runtime, plan, whole_batch, output, query, scratch, lse)


def attend_sparse(
    query: Tensor, kv_cache: Tensor, tables: Tensor, call: CudaSparseCall, scale: float
) -> None:
    keys, values = kv_cache.chunk(2, dim=-1)
    sparse_decode(
        query,
        keys,
        values,
        tables,
        call.plan.seq_lens,
        scale,
        call.scratch,
        call.output,
        call.lse,
    )


def run_layer(
    layer: int, query: Tensor, kv_cache: Tensor, call: CudaSparseCall, output: Tensor, scale: float
) -> None:
    """The sparse rows of a layer: gather, wait for what was ranked ahead, one graph, scatter.
    Inside a graph of the whole step queries and outputs are used where they are.

    Args:
        query: [num_tokens, Hq, D] of the whole batch.
        kv_cache: [B, H, N, 2D] of the layer.
        output: [num_tokens, Hq, D], written at the plan's tokens, and behind them where the plan
            covers the batch: those are padding.
    """
    runtime, plan = call.runtime, call.plan
    rows = min(len(query), len(call.query))  # both may be padded
    in_place = (
        call.whole_batch
        and plan.graphs.is_working()
        and rows == len(call.query)
        and query.is_contiguous()
    )
    if in_place:
        call = replace(call, query=query[:rows], output=output[:rows])
    elif call.whole_batch:
        call.query[:rows].copy_(query[:rows])
    else:
        torch.index_select(query, 0, plan.tokens, out=call.query)
    runtime.await_layer(plan, layer)

    def work() -> None:
        tables = runtime.rank(plan, layer, call.query)
        attend_sparse(call.query, kv_cache, tables, call, scale)
        runtime.estimate(plan, layer, call.query, tables, call.output, call.lse)

    plan.graphs.run((layer, *plan.variant), work)
    if in_place:
        return
    if call.whole_batch:
        output[:rows].copy_(call.output[:rows])
    else:
        count = len(plan.rows)
        output.index_copy_(0, plan.tokens[:count], call.output[:count])


class MetadataBuilder(SplitBuilder, BASE.get_builder_cls()):  # type: ignore[misc]
    def sparse_call(self, runtime: Runtime, plan: StepPlan, whole_batch: bool) -> CudaSparseCall:
        return sparse_call(runtime, plan, whole_batch)


class Impl(SplitImpl, BASE.get_impl_cls()):  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.logits_soft_cap:
            raise ValueError(
                f"sentencekv on CUDA does not support logit soft-capping (here "
                f"{self.logits_soft_cap}): its decode kernel has none. Use another attention "
                "backend for this model."
            )

    def sparse_rows(
        self, layer: int, query: Tensor, kv_cache: Tensor, call: CudaSparseCall, output: Tensor
    ) -> None:
        run_layer(layer, query, kv_cache, call, output, self.scale)


def prepare(runtime: Runtime) -> None:
    """Compile the kernels and capture a graph now: no request waits for it, and what cannot run
    fails at start-up."""
    geometry, cache = runtime.geometry, runtime.pools.layers[0].cache

    def attend(plan: StepPlan, query: Tensor) -> None:
        call = sparse_call(runtime, plan, whole_batch=True)
        run_layer(0, query, cache, call, torch.empty_like(query), geometry.scale)

    warm_up(runtime, attend)


def token_layout(cache: Tensor, layer: Any) -> TokenLayout:
    """Where the tokens lie in a head-block of `cache` [B, H, N, 2D]: in rows of K and V."""
    _, _, block_size, content = cache.shape
    return TokenLayout.rows(block_size, content // 2, cache.device)
