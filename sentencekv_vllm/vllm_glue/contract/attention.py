# SPDX-License-Identifier: Apache-2.0
"""Attention backends, implementations, metadata builders, and the CPU's ops."""

from __future__ import annotations

from .name import How, Name, of

ROWS: tuple[Name, ...] = (
    *of(
        "v1/attention/backend.py",
        "AttentionBackend",
        "vllm_glue/backend.py",
        How.OVERRIDDEN,
        {
            "get_name": "",
            "get_supported_head_sizes": "cls",
            "supports_head_size": "cls, head_size",
            "supported_kv_cache_layouts": "cls",
            "get_preferred_block_size": "cls, default_block_size",
            "supports_compute_capability": "cls, capability",
            "supports_non_causal": "cls",
            "supports_sliding_window": "cls",
            "supports_sink": "cls",
            "supports_mm_prefix": "cls",
            "supports_rswa": "cls",
            "supports_alibi_sqrt": "cls",
            "supports_dcp": "cls",
            "supports_batch_invariance": "cls",
            "supports_attn_type": "cls, attn_type",
            "get_impl_cls": "",
            "get_builder_cls": "",
            "customize_spec": "cls, spec",
        },
    ),
    *of(
        "v1/attention/backend.py",
        "AttentionBackend",
        "vllm_glue/backend.py",
        How.READ,
        (
            "supported_dtypes",
            "supported_kv_cache_dtypes",
        ),
    ),
    *of(
        "v1/attention/backend.py",
        "AttentionBackend",
        "vllm_glue/compat.py",
        How.CALLED,
        {
            "validate_configuration": (
                "cls, head_size, dtype, kv_cache_dtype, block_size, use_mla, has_sink, "
                "use_sparse, use_mm_prefix, use_per_head_quant_scales, "
                "device_capability, attn_type, has_sliding_window=False, "
                "use_non_causal=False, use_batch_invariant=False, "
                "use_kv_connector=False, use_pcp=False, "
                "use_adaptive_verification=False, use_dcp=False, use_rswa=False"
            ),
        },
    ),
    *of(
        "v1/attention/backend.py",
        "AttentionImpl",
        "vllm_glue/impl.py",
        How.OVERRIDDEN,
        {
            "fused_output_quant_supported": "self, quant_key",
        },
    ),
    *of(
        "v1/attention/backend.py",
        "AttentionMetadataBuilder",
        "vllm_glue/metadata.py",
        How.OVERRIDDEN,
        {
            "get_cudagraph_support": "cls, vllm_config, kv_cache_spec",
            "build": ("self, common_prefix_len, common_attn_metadata, fast_build=False"),
        },
    ),
    *of(
        "v1/attention/backend.py",
        "AttentionMetadataBuilder",
        "vllm_glue/metadata.py",
        How.READ,
        ("supports_update_block_table",),
    ),
    *of(
        "v1/attention/backend.py",
        "AttentionCGSupport",
        "vllm_glue/metadata.py",
        How.READ,
        ("UNIFORM_SINGLE_TOKEN_DECODE",),
    ),
    *of(
        "v1/attention/backend.py",
        "CommonAttentionMetadata",
        "vllm_glue/metadata.py",
        How.READ,
        (
            "query_start_loc_cpu",
            "seq_lens",
            "num_reqs",
            "num_actual_tokens",
            "block_table_tensor",
            "slot_mapping",
        ),
    ),
    *of(
        "v1/attention/backends/cpu_attn.py",
        "CPUAttentionMetadata",
        "vllm_glue/metadata.py",
        How.SET,
        ("block_table",),
    ),
    *of(
        "v1/attention/backends/flash_attn.py",
        "FlashAttentionMetadata",
        "vllm_glue/metadata.py",
        How.SET,
        ("block_table",),
    ),
    *of(
        "v1/attention/backends/triton_attn.py",
        "TritonAttentionMetadata",
        "vllm_glue/metadata.py",
        How.SET,
        ("block_table",),
    ),
    *of(
        "v1/attention/backends/cpu_attn.py",
        "CPUAttentionBackendImpl",
        "vllm_glue/impl.py",
        How.OVERRIDDEN,
        {
            "__init__": (
                "self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, "
                "sliding_window, kv_cache_dtype, logits_soft_cap=None, "
                "attn_type=AttentionType.DECODER, kv_sharing_target_layer_name=None, "
                "sinks=None"
            ),
            "forward": (
                "self, layer, query, key, value, kv_cache, attn_metadata, output, "
                "output_scale=None, output_block_scale=None"
            ),
        },
    ),
    *of(
        "v1/attention/backends/flash_attn.py",
        "FlashAttentionImpl",
        "vllm_glue/impl.py",
        How.OVERRIDDEN,
        {
            "__init__": (
                "self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, "
                "sliding_window, kv_cache_dtype, logits_soft_cap=None, "
                "attn_type=AttentionType.DECODER, kv_sharing_target_layer_name=None, "
                "sinks=None"
            ),
            "forward": (
                "self, layer, query, key, value, kv_cache, attn_metadata, output, "
                "output_scale=None, output_block_scale=None"
            ),
        },
    ),
    *of(
        "v1/attention/backends/triton_attn.py",
        "TritonAttentionImpl",
        "vllm_glue/impl.py",
        How.OVERRIDDEN,
        {
            "__init__": (
                "self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, "
                "sliding_window, kv_cache_dtype, logits_soft_cap=None, "
                "attn_type=AttentionType.DECODER, kv_sharing_target_layer_name=None, "
                "sinks=None, use_alibi_sqrt=False, chunk_lookback=-1"
            ),
            "forward": (
                "self, layer, query, key, value, kv_cache, attn_metadata, output, "
                "output_scale=None, output_block_scale=None"
            ),
        },
    ),
    *of(
        "v1/attention/backends/cpu_attn.py",
        "CPUAttentionBackendImpl",
        "vllm_glue/cpu.py",
        How.READ,
        (
            "scale",
            "logits_soft_cap",
        ),
    ),
    *of(
        "v1/attention/backends/flash_attn.py",
        "FlashAttentionImpl",
        "vllm_glue/cuda.py",
        How.READ,
        (
            "scale",
            "logits_soft_cap",
        ),
    ),
    *of(
        "v1/attention/backends/triton_attn.py",
        "TritonAttentionImpl",
        "vllm_glue/cuda.py",
        How.READ,
        (
            "scale",
            "logits_soft_cap",
        ),
    ),
    *of(
        "v1/attention/backends/cpu_attn.py",
        "CPUAttentionBackendImpl",
        "vllm_glue/worker_side.py",
        How.READ,
        ("num_heads",),
    ),
    *of(
        "v1/attention/backends/cpu_attn.py",
        "CPUAttentionMetadataBuilder",
        "vllm_glue/cpu.py",
        How.READ,
        (
            "dtype",
            "isa",
            "kv_cache_dtype",
        ),
    ),
    *of(
        "v1/attention/backends/fa_utils.py",
        "",
        "vllm_glue/cuda.py",
        How.CALLED,
        {
            "is_flash_attn_varlen_func_available": "",
        },
    ),
    *of(
        "v1/attention/backends/registry.py",
        "",
        "vllm_glue/compat.py",
        How.CALLED,
        {
            "register_backend": "backend, class_path=None, is_mamba=False",
        },
    ),
    *of(
        "v1/attention/backends/registry.py",
        "AttentionBackendEnum",
        "vllm_glue/compat.py",
        How.CALLED,
        {
            "get_class": "self",
            "get_path": "self, include_classname=True",
        },
    ),
    *of(
        "v1/attention/backends/registry.py",
        "AttentionBackendEnum",
        "vllm_glue/cuda.py",
        How.READ,
        (
            "FLASH_ATTN",
            "TRITON_ATTN",
        ),
    ),
    *of("v1/kv_cache_layout.py", "KVCacheLayout", "vllm_glue/backend.py", How.READ, ("LBHNC",)),
    *of(
        "_custom_ops.py",
        "",
        "vllm_glue/key_layout.py",
        How.CALLED,
        {
            "cpu_attn_reshape_and_cache": (
                "key, value, key_cache, value_cache, slot_mapping, isa, k_scale=1.0, "
                "v_scale=1.0, kv_cache_dtype='auto'"
            ),
        },
    ),
    *of(
        "_custom_ops.py",
        "",
        "vllm_glue/cpu.py",
        How.CALLED,
        {
            "cpu_attn_get_scheduler_metadata": (
                "num_reqs, num_heads, num_kv_heads, head_dim, seq_lens, dtype, "
                "query_start_loc, causal, sliding_window_size, isa, enable_kv_split, "
                "dynamic_causal=None, kv_cache_dtype='auto'"
            ),
            "cpu_attention_with_kv_cache": (
                "query, key_cache, value_cache, output, query_start_loc, seq_lens, "
                "scale, causal, alibi_slopes, sliding_window, block_table, softcap, "
                "scheduler_metadata, s_aux, dynamic_causal=None, k_scale=1.0, "
                "v_scale=1.0, kv_cache_dtype='auto'"
            ),
        },
    ),
    *of("envs.py", "", "vllm_glue/cpu.py", How.READ, ("VLLM_CPU_ATTN_SPLIT_KV",)),
    *of(
        "model_executor/layers/attention/attention.py",
        "Attention",
        "vllm_glue/worker_side.py",
        How.READ,
        ("impl",),
    ),
    *of(
        "config/vllm.py",
        "",
        "vllm_glue/worker_side.py",
        How.CALLED,
        {
            "get_layers_from_vllm_config": "vllm_config, layer_type, layer_names=None",
        },
    ),
    *of(
        "model_executor/layers/attention/attention.py",
        "Attention",
        "vllm_glue/calibration_run.py",
        How.READ,
        (
            "impl",
            "sliding_window",
        ),
    ),
    Name(
        "model_executor/layers/attention/attention.py",
        "unified_attention_with_output",
        "vllm_glue/calibration_run.py",
        How.ORDER,
        parts=(
            "self.impl.forward(self, query, key, value, kv_cache, attn_metadata, output=output",
        ),
    ),
    Name(
        "v1/attention/backends/cpu_attn.py",
        "CPUAttentionMetadataBuilder._set_isa_to_layers",
        "vllm_glue/cpu.py",
        How.ORDER,
        parts=("layer.isa = self.isa",),
    ),
)
