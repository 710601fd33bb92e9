# SPDX-License-Identifier: Apache-2.0
"""Scheduler process: KV cache manager, block pool, specs, what a step's output says."""

from __future__ import annotations

from .name import How, Name, of

ROWS: tuple[Name, ...] = (
    *of(
        "v1/core/kv_cache_manager.py",
        "KVCacheManager",
        "vllm_glue/manager.py",
        How.WRAPPED,
        {
            "get_computed_blocks": {
                "0.32": "self, request",
                "0.33": "self, request, max_cache_hit_length=None",
            },
        },
    ),
    *of(
        "v1/core/kv_cache_manager.py",
        "KVCacheManager",
        "vllm_glue/manager.py",
        How.CALLED,
        {
            "create_kv_cache_blocks": "self, blocks",
        },
    ),
    *of(
        "v1/core/kv_cache_manager.py",
        "KVCacheManager",
        "vllm_glue/groups.py",
        How.READ,
        ("coordinator",),
    ),
    *of(
        "v1/core/kv_cache_manager.py",
        "KVCacheBlocks",
        "vllm_glue/manager.py",
        How.READ,
        ("blocks",),
    ),
    *of(
        "v1/core/kv_cache_coordinator.py",
        "KVCacheCoordinator",
        "vllm_glue/groups.py",
        How.READ,
        ("single_type_managers",),
    ),
    *of(
        "v1/core/kv_cache_coordinator.py",
        "KVCacheCoordinator",
        "vllm_glue/manager.py",
        How.CALLED,
        {
            "find_longest_cache_hit": "self, block_hashes, max_cache_hit_length",
        },
    ),
    *of(
        "v1/core/kv_cache_coordinator.py",
        "KVCacheCoordinator",
        "vllm_glue/manager.py",
        How.WRAPPED,
        {
            "cache_blocks": "self, request, num_computed_tokens",
        },
    ),
    *of(
        "v1/core/single_type_kv_cache_manager.py",
        "SingleTypeKVCacheManager",
        "vllm_glue/manager.py",
        How.OVERRIDDEN,
        {
            "new_step_starts": "self",
            "remove_skipped_blocks": (
                "self, request_id, processed_computed_tokens, num_prompt_tokens=None"
            ),
            "get_num_blocks_to_allocate": (
                "self, request_id, num_tokens, new_computed_blocks, "
                "total_computed_tokens, num_local_computed_tokens, "
                "num_tokens_main_model, apply_admission_cap=False, prefill_end=0"
            ),
            "allocate_new_blocks": "self, request_id, num_tokens, num_tokens_main_model",
            "pop_blocks_for_free": "self, request_id",
        },
    ),
    *of(
        "v1/core/single_type_kv_cache_manager.py",
        "SingleTypeKVCacheManager",
        "vllm_glue/manager.py",
        How.CALLED,
        {
            "_remove_blocks_in_range": "self, request_id, first_block, last_block",
        },
    ),
    *of(
        "v1/core/single_type_kv_cache_manager.py",
        "SingleTypeKVCacheManager",
        "vllm_glue/manager.py",
        How.READ,
        (
            "block_pool",
            "req_to_blocks",
        ),
    ),
    *of(
        "v1/core/block_pool.py",
        "BlockPool",
        "vllm_glue/manager.py",
        How.CALLED,
        {
            "free_blocks": "self, ordered_blocks",
            "get_new_blocks": "self, num_blocks",
            "get_num_free_blocks": "self",
        },
    ),
    *of(
        "v1/core/block_pool.py", "BlockPool", "vllm_glue/manager.py", How.READ, ("num_gpu_blocks",)
    ),
    *of(
        "v1/core/kv_cache_utils.py", "KVCacheBlock", "vllm_glue/manager.py", How.READ, ("block_id",)
    ),
    *of(
        "v1/core/kv_cache_utils.py",
        "KVCacheBlock",
        "scheduler/turning.py",
        How.READ,
        ("ref_cnt",),
    ),
    *of(
        "v1/kv_cache_spec_registry.py",
        "KVCacheSpecRegistry",
        "vllm_glue/spec.py",
        How.CALLED,
        {
            "_ensure_registered": "cls, vllm_config=None",
            "register": ("cls, kvcache_spec_cls, manager_class=None, uniform_type_base_spec=None"),
        },
    ),
    *of(
        "v1/kv_cache_interface.py",
        "FullAttentionSpec",
        "vllm_glue/spec.py",
        How.CALLED,
        {
            "merge": "cls, specs",
        },
    ),
    *of(
        "v1/kv_cache_interface.py",
        "FullAttentionSpec",
        "vllm_glue/spec.py",
        How.OVERRIDDEN,
        {
            "max_memory_usage_bytes": "self, vllm_config",
        },
    ),
    *of(
        "v1/kv_cache_interface.py",
        "AttentionSpec",
        "vllm_glue/spec.py",
        How.READ,
        ("page_size_bytes",),
    ),
    *of(
        "v1/kv_cache_interface.py",
        "",
        "vllm_glue/backend.py",
        How.CALLED,
        {
            "replace_as": "spec, target_cls, *, drop=(), **changes",
        },
    ),
    *of(
        "v1/kv_cache_interface.py",
        "AttentionSpec",
        "vllm_glue/resolve.py",
        How.READ,
        (
            "num_kv_heads",
            "head_size",
            "dtype",
        ),
    ),
    *of(
        "v1/kv_cache_interface.py", "KVCacheSpec", "vllm_glue/resolve.py", How.READ, ("block_size",)
    ),
    *of(
        "v1/kv_cache_interface.py",
        "KVCacheGroupSpec",
        "vllm_glue/resolve.py",
        How.READ,
        (
            "layer_names",
            "kv_cache_spec",
        ),
    ),
    Name(
        "v1/kv_cache_interface.py",
        "SlidingWindowSpec",
        "vllm_glue/backend.py",
        How.READ,
        parts=("sliding_window", "extra_retained_tokens"),
    ),
    *of(
        "v1/kv_cache_interface.py",
        "KVCacheConfig",
        "vllm_glue/groups.py",
        How.READ,
        ("kv_cache_groups",),
    ),
    *of(
        "v1/kv_cache_interface.py",
        "KVCacheConfig",
        "vllm_glue/scheduler_side.py",
        How.READ,
        ("num_blocks",),
    ),
    *of(
        "v1/kv_cache_interface.py",
        "KVCacheConfig",
        "vllm_glue/worker_side.py",
        How.READ,
        ("needs_kv_cache_zeroing",),
    ),
    *of(
        "v1/core/sched/output.py",
        "SchedulerOutput",
        "vllm_glue/scheduler_side.py",
        How.READ,
        (
            "scheduled_new_reqs",
            "scheduled_cached_reqs",
            "num_scheduled_tokens",
        ),
    ),
    *of(
        "v1/core/sched/output.py",
        "SchedulerOutput",
        "vllm_glue/connector.py",
        How.SET,
        ("has_sync_kv_loads",),
    ),
    *of(
        "v1/core/sched/output.py",
        "SchedulerOutput",
        "vllm_glue/full_graphs.py",
        How.READ,
        ("kv_connector_metadata",),
    ),
    *of(
        "v1/core/sched/output.py",
        "NewRequestData",
        "vllm_glue/scheduler_side.py",
        How.READ,
        (
            "req_id",
            "num_computed_tokens",
        ),
    ),
    *of(
        "v1/core/sched/output.py",
        "CachedRequestData",
        "vllm_glue/scheduler_side.py",
        How.READ,
        (
            "req_ids",
            "num_computed_tokens",
        ),
    ),
    *of(
        "v1/request.py",
        "Request",
        "vllm_glue/scheduler_side.py",
        How.READ,
        (
            "request_id",
            "prompt_token_ids",
            "all_token_ids",
            "resumable",
            "mm_features",
            "sampling_params",
        ),
    ),
    *of("v1/request.py", "Request", "vllm_glue/manager.py", How.READ, ("block_hashes",)),
    *of(
        "v1/request.py",
        "Request",
        "scheduler/ledger.py",
        How.READ,
        (
            "num_prompt_tokens",
            "is_finished",
        ),
    ),
    Name(
        "v1/core/sched/scheduler.py",
        "Scheduler._get_local_prefix_cache_hit",
        "vllm_glue/manager.py",
        How.ORDER,
        parts=(
            "supports_divergent_local_hybrid_hits",
            "self.kv_cache_manager.get_computed_blocks(",
        ),
    ),
    Name(
        "v1/core/kv_cache_manager.py",
        "KVCacheManager.allocate_slots",
        "vllm_glue/manager.py",
        How.ORDER,
        parts=(
            "coordinator.remove_skipped_blocks(",
            "coordinator.get_num_blocks_to_allocate(",
            "coordinator.allocate_new_blocks(",
            "coordinator.cache_blocks(",
        ),
    ),
)
