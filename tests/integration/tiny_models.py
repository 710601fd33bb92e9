# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights, of types whose layers are not all full attention.

Weights are large enough that what a layer attends to decides the next token.
"""

from __future__ import annotations

from typing import Any

WINDOW = 128  # tokens
# A windowed layer behind a full one: what sparse attention approximates gets into its cache.
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": len(LAYERS),
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "sliding_window": WINDOW,
}
CHANGES: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "layer_types": LAYERS * 2,
        "num_hidden_layers": 2 * len(LAYERS),
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
    },
    "cohere2": {"layer_types": LAYERS, "tie_word_embeddings": True, "logit_scale": 1.0},
    "olmo3": {"layer_types": LAYERS},
    "exaone4": {"layer_types": LAYERS},
    "phi3": {"sliding_window": SHAPE["max_position_embeddings"]},
}


def make_model(model_type: str, folder: str) -> None:
    """Write it into a folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    config = AutoConfig.for_model(model_type, **(SHAPE | CHANGES[model_type]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
