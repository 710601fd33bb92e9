# SPDX-License-Identifier: Apache-2.0
"""The attention backend: what we support, and who does the work."""

from __future__ import annotations

from typing import ClassVar

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, replace_as

from .impl import SentenceKVImpl
from .metadata import SentenceKVMetadataBuilder
from .spec import SentenceKVSpec


class SentenceKVBackend(CPUAttentionBackend):
    """Registered as SENTENCEKV; everything it does not support is refused with a reason."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "SENTENCEKV"

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [64, 80, 96, 112, 128, 160, 192, 224, 256]

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return False

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == "decoder"

    @staticmethod
    def get_impl_cls() -> type[SentenceKVImpl]:
        return SentenceKVImpl

    @staticmethod
    def get_builder_cls() -> type[SentenceKVMetadataBuilder]:
        return SentenceKVMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if type(spec) is FullAttentionSpec:
            return replace_as(spec, SentenceKVSpec)
        return spec
