# SPDX-License-Identifier: Apache-2.0
"""The one KV cache group whose blocks are tracked, copied out and freed."""

from __future__ import annotations

from typing import Any

from .manager import SentenceKVManager
from .spec import SentenceKVSpec
from .support import REFUSED


def our_group(kv_cache_config: Any) -> Any:
    """That of the full-attention layers.

    Raises:
        ValueError: vLLM made none of them, or several.
    """
    groups = kv_cache_config.kv_cache_groups
    return _only([isinstance(g.kv_cache_spec, SentenceKVSpec) for g in groups], groups)


def our_manager(kv_cache_manager: Any) -> SentenceKVManager:
    """Its manager; those of other groups are vLLM's.

    Raises:
        ValueError: there is none, or several.
    """
    managers = kv_cache_manager.coordinator.single_type_managers
    manager = _only([isinstance(m, SentenceKVManager) for m in managers], managers)
    assert isinstance(manager, SentenceKVManager)
    return manager


def blocks_of_others(vllm_config: Any, kv_cache_config: Any) -> int:
    """Most blocks that one request takes in the groups that are not ours: their windows."""
    ours = our_group(kv_cache_config)
    specs = [g.kv_cache_spec for g in kv_cache_config.kv_cache_groups if g is not ours]
    return sum(s.max_memory_usage_bytes(vllm_config) // s.page_size_bytes for s in specs)


def _only(ours: list[bool], among: Any) -> Any:
    if ours.count(True) != 1:
        raise ValueError(REFUSED["several groups"].refusal(f"{ours.count(True)} of {len(ours)}"))
    return among[ours.index(True)]
