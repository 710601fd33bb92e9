# SPDX-License-Identifier: Apache-2.0
"""What happens to a vLLM configuration that has selected our backend, before it is used."""

from __future__ import annotations

from typing import Any

import vllm
from vllm.config import KVTransferConfig
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform

from ..request_options import RequestOptions, RequestOptionsError
from ..resolved import ResolvedConfig, resolve
from .resolve import user_config

TESTED = (0, 32)
CPU_BLOCK_SIZE = 32  # vLLM's CPU default of 128 makes selection coarse


def refuse(vllm_config: Any) -> None:
    """Raise for everything that is not supported, with the reason and what to do.

    Raises:
        ValueError: a feature, a model or a vLLM version that we do not support.
    """
    config = user_config(vllm_config)
    _refuse_version(config.allow_untested_vllm)
    for unsupported, what, fix in _conflicts(vllm_config):
        if unsupported:
            raise ValueError(f"--attention-backend sentencekv does not support {what}: {fix}.")


def _refuse_version(allowed: bool) -> None:
    found = tuple(int(part) for part in vllm.__version__.split("+")[0].split(".")[:2])
    if found != TESTED and not allowed:
        raise ValueError(
            f"sentencekv_vllm is tested with vLLM {'.'.join(map(str, TESTED))}, this is "
            f"{vllm.__version__}: install vllm=={'.'.join(map(str, TESTED))}.*, or try it at your "
            'own risk with --additional-config \'{"sentencekv": {"allow_untested_vllm": true}}\''
        )


def _conflicts(vllm_config: Any) -> list[tuple[bool, str, str]]:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache, transfer = vllm_config.cache_config, vllm_config.kv_transfer_config
    other_backend = "use another attention backend for this model"
    connector = transfer.kv_connector if transfer is not None else None
    conflicts = [
        (
            connector not in (None, "SentenceKVConnector"),
            f"a KV connector of your own ({connector}): vLLM has one connector and the backend "
            "moves its blocks through it",
            "remove --kv-transfer-config",
        ),
        (
            getattr(cache, "kv_offloading_size", None) is not None,
            "--kv-offloading-size, which claims vLLM's one KV connector",
            "remove it; the swap pool is sized by host_pool_gib",
        ),
        (
            vllm_config.speculative_config is not None,
            "speculative decoding: a sparse row decodes one token a step",
            "remove --speculative-config",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            f"pipeline parallelism (here {parallel.pipeline_parallel_size})",
            "set --pipeline-parallel-size 1 and use --tensor-parallel-size",
        ),
        (
            parallel.decode_context_parallel_size > 1,
            f"decode context parallelism (here {parallel.decode_context_parallel_size})",
            "set --decode-context-parallel-size 1",
        ),
        (
            parallel.prefill_context_parallel_size > 1,
            f"prefill context parallelism (here {parallel.prefill_context_parallel_size})",
            "set --prefill-context-parallel-size 1",
        ),
        (
            cache.cache_dtype not in ("auto", "float16", "bfloat16"),
            f"a quantised KV cache (here {cache.cache_dtype})",
            "set --kv-cache-dtype auto",
        ),
        (
            not (current_platform.is_cpu() or current_platform.is_cuda()),
            f"the platform {current_platform.device_name!r}: its kernels are for CPUs and for CUDA",
            "use another attention backend",
        ),
        (
            parallel.use_ubatching,
            "microbatches (--enable-dbo, --ubatch-size): a step has one plan for its sparse rows",
            "remove them",
        ),
        (
            # A partial hit is copied into a block that was freed in the same step, before the
            # V2 runner tells us what to copy out of it.
            cache.prefix_match_unit not in (None, cache.block_size),
            f"prefix hits of parts of a block (--prefix-match-unit {cache.prefix_match_unit})",
            "remove --prefix-match-unit",
        ),
    ]
    if model is None:
        return conflicts
    return conflicts + [
        (
            cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")),
            f"a KV cache of {cache.cache_dtype} for a model of {model.dtype}",
            "set --kv-cache-dtype auto",
        ),
        (
            model.runner_type != "generate",
            f"runner {model.runner_type!r}: only text generation decodes",
            other_backend,
        ),
        (model.is_encoder_decoder, "encoder-decoder models", other_backend),
        (model.use_mla, "multi-head latent attention (MLA)", other_backend),
        (
            model.is_hybrid or model.is_attention_free,
            "hybrid, Mamba and attention-free models",
            other_backend,
        ),
        (
            model.get_sliding_window() is not None,
            f"sliding-window attention (here {model.get_sliding_window()} tokens)",
            other_backend,
        ),
        (
            bool(getattr(model, "enable_sleep_mode", False)),
            "sleep mode, which discards the KV cache under the swap pool",
            "remove --enable-sleep-mode",
        ),
    ]


def refuse_partial_selection(vllm_config: Any, name: str) -> None:
    """Our backend for some layer kinds only: their blocks would be managed by two managers."""
    kinds = getattr(vllm_config.attention_config, "backend_per_kind", None) or {}
    ours = [kind for kind, b in kinds.items() if getattr(b, "name", b) == name]
    if ours:
        raise ValueError(
            f"sentencekv serves all layers of a model or none, not only {', '.join(ours)}: "
            "set --attention-backend sentencekv and remove backend_per_kind"
        )


def inject_connector(vllm_config: Any, name: str) -> None:
    """Our connector, which the user need not name."""
    if vllm_config.kv_transfer_config is None:
        vllm_config.kv_transfer_config = KVTransferConfig(kv_connector=name, kv_role="kv_both")


def settle(vllm_config: Any) -> None:
    """Defaults of ours, and an early look at the sizes, after vLLM's own settling."""
    cache = vllm_config.cache_config
    if current_platform.is_cpu() and not cache.user_specified_block_size:
        cache.block_size = CPU_BLOCK_SIZE
    if vllm_config.model_config is not None:
        resolved_config(vllm_config)


def resolved_config(vllm_config: Any) -> ResolvedConfig:
    """Sizes on one rank, from the configuration alone (the API process has no KV cache)."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return resolve(
        user_config(vllm_config),
        block_size=vllm_config.cache_config.block_size,
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_dim=model.get_head_size(),
        num_layers=model.get_num_layers(parallel),
        dtype_size=model.dtype.itemsize,
    )


def check_request_options(vllm_config: Any, extra_args: dict[str, Any] | None) -> None:
    """Refuse a bad override in the API process: that request alone fails, with status 400."""
    if extra_args:
        try:
            RequestOptions.parse(extra_args, resolved_config(vllm_config))
        except RequestOptionsError as error:
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from error
