# SPDX-License-Identifier: Apache-2.0
"""Sliding windows of a model's layers, as its configuration tells them.

Full-attention layers are ours. Windowed ones stay vLLM's: backend, spec and manager. A window as
long as the longest request is none: those layers are full attention, whatever they are called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

WINDOWED = "sliding_attention"  # in `layer_types`, as in transformers
KIND = "sliding_window"  # of vLLM's KVCacheSpecKind: a key of `backend_per_kind`


@dataclass(frozen=True)
class Windows:
    """Windows that a request can outgrow."""

    tokens: int  # of each; 0: there is none
    layers: int  # that have one
    alone: bool  # no layer sees the whole past

    @classmethod
    def of(cls, model: Any) -> Self:
        """Of vLLM's configuration of a model."""
        text, tokens = model.hf_text_config, model.get_sliding_window()
        if tokens is None or tokens >= model.max_model_len:
            return cls(0, 0, False)
        kinds = getattr(text, "layer_types", None)
        if kinds is None:  # the window is every layer's
            return cls(tokens, text.num_hidden_layers, True)
        layers = kinds.count(WINDOWED)
        return cls(tokens, layers, layers == len(kinds)) if layers else cls(0, 0, False)
