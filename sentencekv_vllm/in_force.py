# SPDX-License-Identifier: Apache-2.0
"""What a server runs with, in one line: files, presets and the command line may all have a say."""

from __future__ import annotations

from dataclasses import fields

from .config import SentenceKVConfig
from .resolved import GIB, ResolvedConfig

MIB = 2**20


def in_force(resolved: ResolvedConfig) -> str:
    """Policy, budget, segmenter and pool, and every setting that is not at its default."""
    config, tokens = resolved.config, resolved.num_pages * resolved.block_size
    defaults = SentenceKVConfig()
    changed = [
        f"{f.name}={value!r}"
        for f in fields(config)
        if (value := getattr(config, f.name)) != getattr(defaults, f.name)
    ]
    return (
        f"SentenceKV in force: policy {resolved.policy.name}, token_budget {config.token_budget} "
        f"({resolved.budget_blocks} blocks of {resolved.block_size} of the history), sparse from "
        f"{config.min_context_tokens} tokens on, segmenter {config.segmenter}, swap pool "
        f"{resolved.host_pool_bytes / GIB:.2f} GiB ({config.host_kv_dtype}) a worker for {tokens} "
        f"tokens, when full: {config.on_pool_full}, index {resolved.index_bytes / MIB:.1f} MiB a "
        f"worker on its device ({resolved.code_width} bits a token's code, "
        f"{resolved.index_vectors} vectors a row); not at their defaults: "
        f"{', '.join(changed) or 'none'}"
    )
