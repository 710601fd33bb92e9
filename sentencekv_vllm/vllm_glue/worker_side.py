# SPDX-License-Identifier: Apache-2.0
"""The worker process: builds the runtime over vLLM's KV caches."""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention

from ..ops.load import load_layer_ops
from ..types import Geometry
from ..worker.runtime import Runtime
from .key_layout import cpu_key_offset
from .resolve import resolve_for_engine

logger = logging.getLogger(__name__)


def build_runtime(
    vllm_config: VllmConfig, kv_cache_config: Any, kv_caches: dict[str, torch.Tensor]
) -> Runtime:
    """Allocate the swap pool and the index, and log their sizes."""
    resolved = resolve_for_engine(vllm_config, kv_cache_config)
    names = kv_cache_config.kv_cache_groups[0].layer_names
    caches = [kv_caches[name] for name in names]
    for name, cache in zip(names, caches, strict=True):
        assert cache.is_contiguous(), f"{name}: the cache must be head-major (LBHNC)"
    layers = get_layers_from_vllm_config(vllm_config, Attention, names)
    impl = layers[names[0]].impl
    _, heads, block_size, content = caches[0].shape
    geometry = Geometry(
        num_layers=len(names),
        num_kv_heads=heads,
        group_size=impl.num_heads // heads,
        head_dim=content // 2,
        block_size=block_size,
        rows_per_page=resolved.rows_per_page,
        scale=impl.scale,
    )
    runtime = Runtime(
        geometry,
        caches,
        cpu_key_offset(block_size, content // 2, caches[0].dtype, layers[names[0]].isa),
        num_pages=resolved.num_pages,
        num_slots=vllm_config.scheduler_config.max_num_seqs,
        working_set_blocks=resolved.working_set_blocks,
        ops=load_layer_ops(caches[0].device.type),
        layer_names=names,
    )
    logger.info(
        "SentenceKV: %d host pages of %d tokens (%.2f GiB swap pool), %.1f MiB index, ops: %s",
        resolved.num_pages,
        block_size,
        runtime.pools.host_bytes / 2**30,
        runtime.pools.index_bytes / 2**20,
        runtime.ops.name,
    )
    return runtime
