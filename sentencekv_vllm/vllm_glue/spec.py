# SPDX-License-Identifier: Apache-2.0
"""The KV cache spec that brings our manager with it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from .manager import SentenceKVManager
from .setup import resolved_config
from .visit_room import blocks_for


@dataclass(frozen=True, kw_only=True)
class SentenceKVSpec(FullAttentionSpec):
    """Full attention whose history may leave the GPU while the request runs.

    It needs the memory of full attention, or less where a prompt's history can be on the host.
    """

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        tokens = vllm_config.model_config.max_model_len
        needed = blocks_for(vllm_config, resolved_config(vllm_config), tokens)
        return needed * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        assert all(type(spec) is cls for spec in specs), (
            "all full-attention layers share one KV cache group, or none is ours"
        )
        base = FullAttentionSpec.merge(list(specs))
        return cls(**{f.name: getattr(base, f.name) for f in fields(FullAttentionSpec) if f.init})


# vLLM registers its own specs only while the table is empty.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(
    SentenceKVSpec, SentenceKVManager, uniform_type_base_spec=FullAttentionSpec
)
