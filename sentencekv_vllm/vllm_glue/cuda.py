# SPDX-License-Identifier: Apache-2.0
"""CUDA: vLLM's FlashAttention or Triton backend for dense rows, our kernel for sparse rows."""

from __future__ import annotations

from dataclasses import dataclass
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
    """Buffers of `sparse_decode`."""

    scratch: DecodeScratch
    lse: Tensor  # [S, Hq] float32


def scratch_for(runtime: Runtime, rows: int, tokens: int) -> DecodeScratch:
    geometry = runtime.geometry
    return DecodeScratch.allocate(
        rows, geometry.num_query_heads, geometry.head_dim, tokens, runtime.device
    )


def sparse_buffers(runtime: Runtime, plan: StepPlan, scratch: DecodeScratch) -> CudaSparseCall:
    geometry, cache = runtime.geometry, runtime.pools.layers[0].cache
    shape = (len(plan.rows), geometry.num_query_heads)
    output = torch.empty(*shape, geometry.head_dim, dtype=cache.dtype, device=cache.device)
    return CudaSparseCall(runtime, plan, output, scratch, torch.empty(shape, device=cache.device))


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


class MetadataBuilder(SplitBuilder, BASE.get_builder_cls()):  # type: ignore[misc]
    _scratch: DecodeScratch | None = None
    _scratch_size = (0, 0)  # rows, tokens

    def sparse_call(self, runtime: Runtime, plan: StepPlan) -> CudaSparseCall:
        rows, _, width = plan.out.head_tables.shape
        tokens, have = width * runtime.geometry.block_size, self._scratch_size
        if self._scratch is None or rows > have[0] or tokens > have[1]:
            # Grown between steps, never between layers.
            self._scratch_size = max(rows, have[0]), max(2 * tokens, have[1])
            self._scratch = scratch_for(runtime, *self._scratch_size)
        return sparse_buffers(runtime, plan, self._scratch)


class Impl(SplitImpl, BASE.get_impl_cls()):  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.logits_soft_cap:
            raise ValueError(
                f"sentencekv on CUDA does not support logit soft-capping (here "
                f"{self.logits_soft_cap}): its decode kernel has none. Use another attention "
                "backend for this model."
            )

    def attend(self, query: Tensor, kv_cache: Tensor, tables: Tensor, call: CudaSparseCall) -> None:
        attend_sparse(query, kv_cache, tables, call, self.scale)


def prepare(runtime: Runtime) -> None:
    """Compile the kernels now: no request waits for it, and what cannot run fails at start-up."""
    geometry, cache = runtime.geometry, runtime.pools.layers[0].cache

    def attend(plan: StepPlan, query: Tensor) -> None:
        tables = plan.out.head_tables
        scratch = scratch_for(runtime, 1, tables.shape[2] * geometry.block_size)
        call = sparse_buffers(runtime, plan, scratch)
        attend_sparse(query, cache, tables, call, geometry.scale)

    warm_up(runtime, attend)


def token_layout(cache: Tensor, layer: Any) -> TokenLayout:
    """Where the tokens lie in a head-block of `cache` [B, H, N, 2D]: in rows of K and V."""
    _, _, block_size, content = cache.shape
    return TokenLayout.rows(block_size, content // 2, cache.device)
