# SPDX-License-Identifier: Apache-2.0
"""KV connector, its statistics and how it is found."""

from __future__ import annotations

from .name import How, Name, of

ROWS: tuple[Name, ...] = (
    *of(
        "distributed/kv_transfer/kv_connector/v1/base.py",
        "KVConnectorBase_V1",
        "vllm_glue/connector.py",
        How.OVERRIDDEN,
        {
            "__init__": "self, vllm_config, role, kv_cache_config",
            "bind_kv_cache_manager": "self, kv_cache_manager",
            "on_new_request": "self, request",
            "get_num_new_matched_tokens": "self, request, num_computed_tokens",
            "update_state_after_alloc": "self, request, blocks, num_external_tokens",
            "build_connector_meta": "self, scheduler_output",
            "update_connector_output": "self, connector_output",
            "requires_kv_delivery": "self",
            "register_kv_caches": "self, kv_caches",
            "handle_preemptions": "self, kv_connector_metadata",
            "start_load_kv": "self, forward_context, **kwargs",
            "wait_for_layer_load": "self, layer_name",
            "save_kv_layer": "self, layer_name, kv_layer, attn_metadata, **kwargs",
            "wait_for_save": "self",
            "build_connector_worker_meta": "self",
            "shutdown": "self",
            "get_kv_connector_stats": "self",
            "build_kv_connector_stats": "cls, data=None",
            "build_prom_metrics": (
                "cls, vllm_config, metric_types, labelnames, per_engine_labelvalues"
            ),
        },
    ),
    *of(
        "distributed/kv_transfer/kv_connector/v1/base.py",
        "KVConnectorBase_V1",
        "vllm_glue/connector.py",
        How.READ,
        (
            "_vllm_config",
            "_kv_cache_config",
        ),
    ),
    *of(
        "distributed/kv_transfer/kv_connector/v1/base.py",
        "SupportsHMA",
        "vllm_glue/connector.py",
        How.OVERRIDDEN,
        {
            "request_finished_all_groups": "self, request, block_ids",
        },
    ),
    *of(
        "distributed/kv_transfer/kv_connector/v1/base.py",
        "KVConnectorWorkerMetadata",
        "vllm_glue/connector.py",
        How.OVERRIDDEN,
        {
            "aggregate": "self, other",
        },
    ),
    *of(
        "v1/outputs.py",
        "KVConnectorOutput",
        "vllm_glue/connector.py",
        How.READ,
        ("kv_connector_worker_meta",),
    ),
    *of(
        "distributed/kv_transfer/kv_connector/v1/metrics.py",
        "KVConnectorStats",
        "vllm_glue/stats.py",
        How.OVERRIDDEN,
        {
            "reset": "self",
            "aggregate": "self, other",
            "reduce": "self",
            "is_empty": "self",
        },
    ),
    *of(
        "distributed/kv_transfer/kv_connector/v1/metrics.py",
        "KVConnectorStats",
        "vllm_glue/stats.py",
        How.READ,
        ("data",),
    ),
    *of(
        "distributed/kv_transfer/kv_connector/v1/metrics.py",
        "KVConnectorPromMetrics",
        "vllm_glue/stats.py",
        How.OVERRIDDEN,
        {
            "__init__": ("self, vllm_config, metric_types, labelnames, per_engine_labelvalues"),
            "observe": "self, transfer_stats_data, engine_idx=0",
        },
    ),
    *of(
        "distributed/kv_transfer/kv_connector/v1/metrics.py",
        "KVConnectorPromMetrics",
        "vllm_glue/stats.py",
        How.READ,
        (
            "_counter_cls",
            "_gauge_cls",
            "per_engine_labelvalues",
        ),
    ),
    *of(
        "distributed/kv_transfer/kv_connector/factory.py",
        "KVConnectorFactory",
        "vllm_glue/compat.py",
        How.READ,
        ("_registry",),
    ),
    *of(
        "distributed/kv_transfer/kv_connector/factory.py",
        "KVConnectorFactory",
        "vllm_glue/compat.py",
        How.CALLED,
        {
            "register_connector": "cls, name, module_path, class_name",
        },
    ),
    *of(
        "distributed/kv_transfer/kv_transfer_state.py",
        "",
        "vllm_glue/metadata.py",
        How.CALLED,
        {
            "get_kv_transfer_group": "",
            "has_kv_transfer_group": "",
        },
    ),
)
