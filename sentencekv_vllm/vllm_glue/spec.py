# SPDX-License-Identifier: Apache-2.0
"""The KV cache spec that brings our manager with it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from .manager import SentenceKVManager


@dataclass(frozen=True, kw_only=True)
class SentenceKVSpec(FullAttentionSpec):
    """Full attention whose history may leave the GPU while the request runs.

    Memory needs are those of full attention: during prefill the whole prompt is on the GPU.
    """

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
