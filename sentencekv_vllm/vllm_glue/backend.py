# SPDX-License-Identifier: Apache-2.0
"""The attention backend: what we support, and who does the work."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    SlidingWindowSpec,
    replace_as,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from .resolve import CPU_BLOCK_SIZE
from .spec import SentenceKVSpec
from .windows import Windows

if current_platform.is_cpu():
    from . import cpu as platform
else:
    from . import cuda as platform  # type: ignore[no-redef]


__all__ = ["SentenceKVBackend", "platform"]

WINDOW_FIELDS = ("sliding_window", "extra_retained_tokens")  # that full attention lacks


class SentenceKVBackend(platform.BASE):
    """Registered as SENTENCEKV; everything it does not support is refused with a reason."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [
        dtype
        for dtype in platform.BASE.supported_dtypes
        if current_platform.is_cpu() or dtype != torch.float32
    ]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]
    # vLLM 0.33: models may write keys themselves, and call attention without them.
    supports_kv_cache_update_bypass = False

    @staticmethod
    def get_name() -> str:
        return "SENTENCEKV"

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [64, 80, 96, 112, 128, 160, 192, 224, 256]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size in cls.get_supported_head_sizes() and super().supports_head_size(head_size)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)  # head-major: a head-block is contiguous

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Tokens in a block unless the user says. The platform's `update_block_size_for_backend`
        asks, after `setup.settle`: in vLLM 0.33 on the CPU, too."""
        if current_platform.is_cpu():
            return CPU_BLOCK_SIZE
        return int(super().get_preferred_block_size(default_block_size))

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return capability is None or capability.major >= 8  # bf16, and what the kernels assume

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Windows that no request outgrows. `setup` leaves other windowed layers to vLLM."""
        config = get_current_vllm_config_or_none()
        model = None if config is None else config.model_config
        return model is not None and not Windows.of(model).layers

    @classmethod
    def supports_sink(cls) -> bool:
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        return False

    @classmethod
    def supports_dcp(cls) -> bool:
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == "decoder"

    @staticmethod
    def get_impl_cls() -> type[Any]:
        return platform.Impl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        return platform.MetadataBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if type(spec) is FullAttentionSpec:
            return replace_as(spec, SentenceKVSpec)
        if type(spec) is SlidingWindowSpec:  # of a layer of ours: longer than any request
            return replace_as(spec, SentenceKVSpec, drop=WINDOW_FIELDS)
        return spec
