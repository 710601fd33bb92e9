# SPDX-License-Identifier: Apache-2.0
"""Configuration and front end: what is read to settle sizes and refuse, what is wrapped."""

from __future__ import annotations

from .name import How, Name, of

ROWS: tuple[Name, ...] = (
    *of(
        "platforms/cpu.py",
        "CpuPlatform",
        "vllm_glue/compat.py",
        How.WRAPPED,
        {
            "check_and_update_config": "cls, vllm_config",
            "get_attn_backend_cls": "cls, selected_backend, attn_selector_config, num_heads=None",
        },
    ),
    *of(
        "platforms/cuda.py",
        "CudaPlatformBase",
        "vllm_glue/compat.py",
        How.WRAPPED,
        {
            "check_and_update_config": "cls, vllm_config",
        },
    ),
    *of(
        "v1/engine/input_processor.py",
        "InputProcessor",
        "vllm_glue/compat.py",
        How.WRAPPED,
        {
            "_validate_params": "self, params, supported_tasks",
            "process_inputs": (
                "self, request_id, prompt, params, supported_tasks, arrival_time=None, "
                "lora_request=None, tokenization_kwargs=None, trace_headers=None, priority=0, "
                "data_parallel_rank=None, resumable=False, session_id=None, kv_hints=None"
            ),
        },
    ),
    *of(
        "v1/engine/input_processor.py",
        "InputProcessor",
        "vllm_glue/compat.py",
        How.READ,
        ("vllm_config",),
    ),
    *of(
        "v1/engine/__init__.py",
        "EngineCoreRequest",
        "vllm_glue/request_limits.py",
        How.READ,
        (
            "prompt_token_ids",
            "prompt_embeds",
            "mm_features",
            "resumable",
            "sampling_params",
        ),
    ),
    *of(
        "exceptions.py",
        "VLLMValidationError",
        "vllm_glue/setup.py",
        How.CALLED,
        {
            "__init__": "self, message, *, parameter=None, value=None",
        },
    ),
    *of("__init__.py", "", "vllm_glue/setup.py", How.READ, ("__version__",)),
    *of("envs.py", "", "vllm_glue/setup.py", How.READ, ("VLLM_USE_RUST_FRONTEND",)),
    *of(
        "config/vllm.py",
        "VllmConfig",
        "vllm_glue/setup.py",
        How.READ,
        (
            "model_config",
            "parallel_config",
            "cache_config",
            "kv_transfer_config",
            "speculative_config",
            "attention_config",
        ),
    ),
    *of("config/vllm.py", "VllmConfig", "vllm_glue/resolve.py", How.READ, ("additional_config",)),
    *of(
        "config/vllm.py",
        "VllmConfig",
        "vllm_glue/full_graphs.py",
        How.READ,
        (
            "compilation_config",
            "use_v2_model_runner",
        ),
    ),
    *of(
        "config/vllm.py", "VllmConfig", "vllm_glue/worker_side.py", How.READ, ("scheduler_config",)
    ),
    *of(
        "config/vllm.py",
        "VllmConfig",
        "vllm_glue/visit_room.py",
        How.READ,
        ("max_in_flight_tokens",),
    ),
    *of(
        "config/parallel.py",
        "ParallelConfig",
        "vllm_glue/setup.py",
        How.READ,
        (
            "pipeline_parallel_size",
            "decode_context_parallel_size",
            "prefill_context_parallel_size",
            "data_parallel_size",
            "use_ubatching",
            "enable_fault_tolerance",
        ),
    ),
    *of(
        "config/cache.py",
        "CacheConfig",
        "vllm_glue/setup.py",
        How.READ,
        (
            "cache_dtype",
            "kv_offloading_size",
            "prefix_match_unit",
            "block_size",
            "user_specified_block_size",
        ),
    ),
    *of(
        "config/cache.py",
        "CacheConfig",
        "vllm_glue/request_limits.py",
        How.READ,
        ("num_gpu_blocks",),
    ),
    *of(
        "config/model.py",
        "ModelConfig",
        "vllm_glue/setup.py",
        How.READ,
        (
            "runner_type",
            "is_encoder_decoder",
            "use_mla",
            "is_hybrid",
            "is_attention_free",
            "enable_sleep_mode",
            "dtype",
        ),
    ),
    *of(
        "config/model.py",
        "ModelConfig",
        "vllm_glue/setup.py",
        How.CALLED,
        {
            "get_num_kv_heads": "self, parallel_config, arch_config=None",
            "get_head_size": "self",
            "get_num_layers": "self, parallel_config",
        },
    ),
    *of(
        "config/model.py",
        "ModelConfig",
        "vllm_glue/windows.py",
        How.CALLED,
        {
            "get_sliding_window": "self",
        },
    ),
    *of(
        "config/model.py",
        "ModelConfig",
        "vllm_glue/windows.py",
        How.READ,
        (
            "max_model_len",
            "hf_text_config",
        ),
    ),
    Name(
        "v1/attention/selector.py",
        "get_attn_backend",
        "vllm_glue/setup.py",
        How.ORDER,
        parts=("attention_config.backend_per_kind.get(kind.value, backend)",),
    ),
    Name(
        "v1/kv_cache_interface.py",
        "KVCacheSpecKind",
        "vllm_glue/windows.py",
        How.READ,
        parts=("'sliding_window'",),
    ),
    *of(
        "config/scheduler.py",
        "SchedulerConfig",
        "vllm_glue/setup.py",
        How.READ,
        ("disable_hybrid_kv_cache_manager",),
    ),
    *of(
        "config/model.py", "ModelConfig", "vllm_glue/resolve.py", How.READ, ("skip_tokenizer_init",)
    ),
    *of("config/model.py", "ModelConfig", "vllm_glue/worker_side.py", How.READ, ("max_model_len",)),
    *of(
        "config/scheduler.py",
        "SchedulerConfig",
        "vllm_glue/scheduler_side.py",
        How.READ,
        (
            "max_num_seqs",
            "max_num_batched_tokens",
        ),
    ),
    *of(
        "config/scheduler.py",
        "SchedulerConfig",
        "vllm_glue/visit_room.py",
        How.READ,
        ("scheduler_reserve_full_isl",),
    ),
    *of(
        "config/attention.py",
        "AttentionConfig",
        "vllm_glue/setup.py",
        How.READ,
        (
            "backend_per_kind",
            "hisparse_config",
        ),
    ),
    *of("config/attention.py", "AttentionConfig", "vllm_glue/compat.py", How.READ, ("backend",)),
    *of(
        "config/compilation.py",
        "CompilationConfig",
        "vllm_glue/full_graphs.py",
        How.READ,
        ("cudagraph_mode",),
    ),
    *of(
        "config/compilation.py",
        "CUDAGraphMode",
        "vllm_glue/full_graphs.py",
        How.CALLED,
        {
            "mixed_mode": "self",
        },
    ),
    *of(
        "config/kv_transfer.py",
        "KVTransferConfig",
        "vllm_glue/setup.py",
        How.READ,
        (
            "kv_connector",
            "kv_role",
        ),
    ),
    *of("sampling_params.py", "SamplingParams", "vllm_glue/compat.py", How.READ, ("extra_args",)),
    *of("sampling_params.py", "SamplingParams", "vllm_glue/scheduler_side.py", How.READ, ("seed",)),
    *of(
        "sampling_params.py",
        "SamplingParams",
        "vllm_glue/request_limits.py",
        How.READ,
        ("max_tokens", "min_tokens"),
    ),
    *of(
        "v1/sample/logits_processor/__init__.py",
        "AdapterLogitsProcessor",
        "vllm_glue/force_tokens.py",
        How.OVERRIDDEN,
        {
            "new_req_logits_processor": "self, params",
        },
    ),
    *of(
        "v1/sample/logits_processor/interface.py",
        "LogitsProcessor",
        "vllm_glue/force_tokens.py",
        How.OVERRIDDEN,
        {
            "validate_params": "cls, sampling_params",
            "is_argmax_invariant": "self",
        },
    ),
    *of(
        "tokenizers/registry.py",
        "",
        "vllm_glue/resolve.py",
        How.CALLED,
        {
            "cached_tokenizer_from_config": "model_config, **kwargs",
        },
    ),
    Name(
        "platforms/cpu.py",
        "CpuPlatform.update_block_size_for_backend",
        "vllm_glue/backend.py",
        How.READ,
        "cls, vllm_config",
    ),
)
