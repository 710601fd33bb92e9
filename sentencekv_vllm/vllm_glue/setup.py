# SPDX-License-Identifier: Apache-2.0
"""What happens to a vLLM configuration that has selected our backend, before it is used."""

from __future__ import annotations

import multiprocessing
from typing import Any

import vllm
from vllm import envs
from vllm.config import KVTransferConfig
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from ..request_options import RequestOptions, RequestOptionsError
from ..resolved import ResolvedConfig, resolve
from ..worker.host_check import check_pools_fit
from .resolve import CPU_BLOCK_SIZE, user_config
from .support import HYBRIDS, REFUSED
from .windows import KIND, Windows

TESTED = ((0, 32), (0, 33))


def refuse(vllm_config: Any) -> None:
    """Raise for everything that is not supported, with the reason and what to do.

    Raises:
        ValueError: a feature, a model or a vLLM version that we do not support.
    """
    config = user_config(vllm_config)
    _refuse_version(config.allow_untested_vllm)
    for key, (unsupported, found) in conflicts(vllm_config).items():
        if unsupported:
            raise ValueError(REFUSED[key].refusal(found))


def _refuse_version(allowed: bool) -> None:
    found = tuple(int(part) for part in vllm.__version__.split("+")[0].split(".")[:2])
    if found not in TESTED and not allowed:
        tested = [".".join(map(str, version)) for version in TESTED]
        raise ValueError(
            f"sentencekv_vllm is tested with vLLM {' and '.join(tested)}, this is "
            f"{vllm.__version__}: install vllm=={tested[-1]}.*, or try it at your "
            'own risk with --additional-config \'{"sentencekv": {"allow_untested_vllm": true}}\''
        )


def conflicts(vllm_config: Any) -> dict[str, tuple[bool, Any]]:
    """By key in `support.REFUSED`: whether this configuration asks for it, and the value to
    show, None where the name says it all."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache, transfer = vllm_config.cache_config, vllm_config.kv_transfer_config
    connector = transfer.kv_connector if transfer is not None else None
    found: dict[str, tuple[bool, Any]] = {
        "connector": (connector not in (None, "SentenceKVConnector"), connector),
        "KV offloading": (getattr(cache, "kv_offloading_size", None) is not None, None),
        "HiSparse": (vllm_config.attention_config.hisparse_config is not None, None),
        "speculative": (vllm_config.speculative_config is not None, None),
        "pipeline": _above_one(parallel.pipeline_parallel_size),
        "DCP": _above_one(parallel.decode_context_parallel_size),
        "PCP": _above_one(parallel.prefill_context_parallel_size),
        "microbatches": (parallel.use_ubatching, None),
        "fault tolerance": (parallel.enable_fault_tolerance, None),
        "Rust front end": (envs.VLLM_USE_RUST_FRONTEND, None),
        "fp8 KV": (cache.cache_dtype not in ("auto", "float16", "bfloat16"), cache.cache_dtype),
        "partial prefix hits": (
            # A partial hit is copied into a block that was freed in the same step, before the
            # V2 runner tells us what to copy out of it.
            cache.prefix_match_unit not in (None, cache.block_size),
            cache.prefix_match_unit,
        ),
        "platform": (
            not (current_platform.is_cpu() or current_platform.is_cuda()),
            current_platform.device_name,
        ),
    }
    if model is None:
        return found
    return found | _conflicts_of_model(model, cache) | _conflicts_of_windows(vllm_config)


def _above_one(size: int) -> tuple[bool, int]:
    return size > 1, size


def _conflicts_of_model(model: Any, cache: Any) -> dict[str, tuple[bool, Any]]:
    chunk = getattr(model, "attention_chunk_size", None)
    return {
        "KV dtype": (
            cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")),
            f"{cache.cache_dtype} for a model of {model.dtype}",
        ),
        "runner": (model.runner_type != "generate", repr(model.runner_type)),
        "encoder-decoder": (model.is_encoder_decoder, None),
        "MLA": (model.use_mla, None),
        "hybrid": (model.is_hybrid or model.is_attention_free, None),
        "chunked attention": (chunk is not None, f"{chunk} tokens"),
        "sleep mode": (bool(getattr(model, "enable_sleep_mode", False)), None),
    }


def _conflicts_of_windows(vllm_config: Any) -> dict[str, tuple[bool, Any]]:
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    windows, model_type = Windows.of(model), model.hf_text_config.model_type
    found = windows.layers > 0
    return {
        "windows alone": (windows.alone, f"{windows.tokens} tokens"),
        "other windows": (found and model_type not in HYBRIDS, model_type),
        "one group for windows": (
            found and bool(scheduler.disable_hybrid_kv_cache_manager),
            None,
        ),
    }


def refuse_partial_selection(vllm_config: Any, name: str) -> None:
    """Our backend for some layer kinds only: their blocks would be managed by two managers."""
    kinds = getattr(vllm_config.attention_config, "backend_per_kind", None) or {}
    ours = [kind for kind, b in kinds.items() if getattr(b, "name", b) == name]
    if ours:
        raise ValueError(REFUSED["some layers"].refusal(", ".join(ours)))


def inject_connector(vllm_config: Any, name: str) -> None:
    """Our connector, which the user need not name."""
    if vllm_config.kv_transfer_config is None:
        vllm_config.kv_transfer_config = KVTransferConfig(kv_connector=name, kv_role="kv_both")


def leave_windows_to_stock(vllm_config: Any) -> None:
    """The backend of windowed layers, where the user has not named it: vLLM's, and the one that
    serves dense rows, since all layers of a model have one cache layout."""
    model = vllm_config.model_config
    if model is not None and Windows.of(model).layers:
        from .backend import platform  # once a platform's attention is wanted

        stock = AttentionBackendEnum[platform.BASE.get_name()]
        vllm_config.attention_config.backend_per_kind.setdefault(KIND, stock)


def settle(vllm_config: Any) -> None:
    """Defaults of ours, and an early look at the sizes, after vLLM's own settling."""
    cache = vllm_config.cache_config
    if current_platform.is_cpu() and not cache.user_specified_block_size:
        cache.block_size = CPU_BLOCK_SIZE
    if vllm_config.model_config is not None:
        resolved = resolved_config(vllm_config)
        if multiprocessing.parent_process() is None:  # before there are workers that hold memory
            check_pools_fit(resolved, local_workers(vllm_config.parallel_config))


def local_workers(parallel: Any) -> int:
    """Workers of this machine, each with a swap pool."""
    return int(parallel.local_world_size * max(1, parallel.data_parallel_size_local))


def resolved_config(vllm_config: Any) -> ResolvedConfig:
    """Sizes on one rank, from the configuration alone (the API process has no KV cache)."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return resolve(
        user_config(vllm_config),
        block_size=vllm_config.cache_config.block_size,
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_dim=model.get_head_size(),
        num_layers=model.get_num_layers(parallel) - Windows.of(model).layers,
        dtype_size=model.dtype.itemsize,
    )


def check_request_options(vllm_config: Any, extra_args: dict[str, Any] | None) -> None:
    """Refuse a bad override in the API process: that request alone fails, with status 400."""
    if extra_args:
        try:
            RequestOptions.parse(extra_args, resolved_config(vllm_config))
        except RequestOptionsError as error:
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from error
