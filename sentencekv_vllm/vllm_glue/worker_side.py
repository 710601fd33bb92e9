# SPDX-License-Identifier: Apache-2.0
"""The worker process: builds the runtime over vLLM's KV caches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention

from ..config import ConfigError
from ..ops.layer_ops import LayerOps
from ..ops.load import Sizes, make_layer_ops
from ..resolved import ResolvedConfig, blocks
from ..types import Geometry
from ..worker.graphs import CudaGraphs, Graph
from ..worker.host_check import check_pools_fit
from ..worker.prefetch import Prefetch
from ..worker.runtime import Runtime
from ..worker.tables import rounded_up
from ..worker.visit_stream import visit_stream
from ..worker.warm_start import MAX_ROWS
from . import full_graphs, setup
from .backend import platform
from .calibration import find_bases
from .groups import our_group
from .resolve import resolve_for_engine
from .visit_room import visit_room

logger = logging.getLogger(__name__)


def build_runtime(
    vllm_config: VllmConfig, kv_cache_config: Any, kv_caches: dict[str, torch.Tensor]
) -> Runtime:
    """Allocate the swap pool and the index, and log their sizes.

    Raises:
        ConfigError: they do not fit into the memory that is left.
        ValueError: vLLM's KV cache, or its use of CUDA graphs, is not one that we can serve.
    """
    group = our_group(kv_cache_config)
    resolved = resolve_for_engine(vllm_config, group)
    _refuse_cache(kv_cache_config)
    full_graphs.install(vllm_config)
    names = group.layer_names
    caches = [kv_caches[name] for name in names]
    for name, cache in zip(names, caches, strict=True):
        assert cache.is_contiguous(), f"{name}: the cache must be head-major (LBHNC)"
    layer = get_layers_from_vllm_config(vllm_config, Attention, names)[names[0]]
    _, heads, block_size, content = caches[0].shape
    geometry = Geometry(
        num_layers=len(names),
        num_kv_heads=heads,
        group_size=layer.impl.num_heads // heads,
        head_dim=content // 2,
        block_size=block_size,
        rows_per_page=resolved.rows_per_page,
        scale=layer.impl.scale,
        vectors_per_row=resolved.index_vectors,
        code_width=resolved.code_width,
        host_format=resolved.host_format,
    )
    sizes = _sizes(vllm_config, resolved, geometry, caches[0].device)
    on_gpu = sizes.device.type == "cuda"
    device = sizes.device
    if not on_gpu:  # the weights are there by now; on a GPU the pool is pinned below
        workers = setup.local_workers(vllm_config.parallel_config)
        check_pools_fit(resolved, workers, sum(c.nbytes for c in caches))

    # First, while nothing but vLLM's own lies beside the forwards' tensors.
    bases = find_bases(vllm_config, resolved, geometry, names, device)

    def new_graph() -> Callable[[], Graph] | None:
        return CudaGraphs(device) if on_gpu and resolved.config.cuda_graphs else None

    try:
        runtime = Runtime(
            geometry,
            caches,
            platform.token_layout(caches[0], layer),
            num_pages=resolved.num_pages,
            num_slots=vllm_config.scheduler_config.max_num_seqs,
            working_set_blocks=resolved.working_set_blocks,
            ops=make_layer_ops(sizes),
            layer_names=names,
            layer_share=resolved.config.layer_share,
            observation_window=resolved.observation_window,
            sizes=sizes if on_gpu else None,
            new_graph=new_graph(),
            warm_ops=_warm_ops(sizes) if resolved.config.warm_start else None,
            visits=visit_stream(device, len(names))
            if visit_room(vllm_config, resolved) is not None
            else None,
            prefetch=Prefetch(device, len(names), new_graph()) if on_gpu else None,
            bases=bases,
        )
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the index ({resolved.index_bytes / 2**30:.2f} GiB) and the buffers of the decode "
            "kernels do not fit beside vLLM's KV cache: lower --gpu-memory-utilization, which "
            "leaves them room, --max-num-seqs or host_pool_gib"
        ) from error
    platform.prepare(runtime)
    logger.info(
        "SentenceKV: %d host pages of %d tokens (%.2f GiB swap pool, %s), %.1f MiB index, ops: %s",
        resolved.num_pages,
        block_size,
        runtime.pools.host_bytes / 2**30,
        resolved.config.host_kv_dtype,
        runtime.pools.index_bytes / 2**20,
        runtime.ops.name,
    )
    return runtime


def _refuse_cache(kv_cache_config: Any) -> None:
    if kv_cache_config.needs_kv_cache_zeroing:
        raise ValueError(
            "sentencekv does not support models whose KV blocks vLLM zeroes before use (mixed "
            "cache precisions, Mamba): a freed block would be zeroed before it is copied out. "
            "Use another attention backend for this model."
        )


def _warm_ops(sizes: Sizes) -> LayerOps:
    return make_layer_ops(replace(sizes, max_requests=min(MAX_ROWS, sizes.max_requests)))


def _sizes(
    vllm_config: VllmConfig, resolved: ResolvedConfig, geometry: Geometry, device: torch.device
) -> Sizes:
    """Bounds of a batch: by the configuration, and by what the swap pool can hold."""
    config, pages = resolved.config, resolved.num_pages
    n, tokens = geometry.block_size, vllm_config.model_config.max_model_len
    # A sparse request has a host page for every block of sinks and history.
    covered = resolved.working_set_blocks if config.stay_dense_when_covered else 0
    shortest = resolved.sink_blocks + covered + 1
    fit = max(1, pages // shortest)
    if resolved.observation_window:  # compacted requests hold no pages
        fit = vllm_config.scheduler_config.max_num_seqs
    return Sizes(
        geometry=geometry,
        device=device,
        max_requests=min(vllm_config.scheduler_config.max_num_seqs, fit),
        max_pages=rounded_up(min(blocks(tokens, n), pages)),
        # All sentences of a prompt are told at once; its last one may be short.
        max_sentences=rounded_up(blocks(tokens, min(config.min_sentence_tokens, n)) + 1),
        max_selected=max(1, resolved.working_set_blocks),
    )
