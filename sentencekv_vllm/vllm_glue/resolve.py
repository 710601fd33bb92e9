# SPDX-License-Identifier: Apache-2.0
"""From vLLM's configuration to ours, the same on the scheduler and on every worker."""

from __future__ import annotations

import logging
from typing import Any

from vllm.config import VllmConfig

from ..config import SentenceKVConfig
from ..presets import with_preset
from ..resolved import ResolvedConfig, resolve
from ..segmentation.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

CONFIG_KEY = "sentencekv"
CPU_BLOCK_SIZE = 32  # vLLM's CPU default of 128 makes selection coarse


def user_config(vllm_config: VllmConfig) -> SentenceKVConfig:
    """`--additional-config '{"sentencekv": {...}}'`, checked, over the preset that it names."""
    values = (vllm_config.additional_config or {}).get(CONFIG_KEY, {})
    return SentenceKVConfig.from_dict(with_preset(values))


def resolve_for_engine(vllm_config: VllmConfig, group: Any) -> ResolvedConfig:
    """Sizes for our KV cache group of this model, on one rank."""
    spec = group.kv_cache_spec
    return resolve(
        user_config(vllm_config),
        block_size=spec.block_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_size,
        num_layers=len(group.layer_names),
        dtype_size=spec.dtype.itemsize,
    )


def load_vocabulary(vllm_config: VllmConfig) -> Vocabulary | None:
    """Text of every token, for segmentation; None where the engine has no tokenizer, or none
    whose pieces can be read, which the log says."""
    if vllm_config.model_config.skip_tokenizer_init:
        return None
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
    try:
        vocabulary = Vocabulary.from_tokenizer(tokenizer)
    except Exception as error:  # of any kind: code of others, which knows nothing of us
        logger.warning(
            "SentenceKV: the pieces of the tokenizer (%s) cannot be read (%s: %s): sentences are "
            "of fixed length, as without a tokenizer.",
            type(tokenizer).__name__,
            type(error).__name__,
            error,
        )
        return None
    return vocabulary if vocabulary.num_tokens else None
