# SPDX-License-Identifier: Apache-2.0
"""What the plan needs to know of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation.real.models import full_name, models_folder
from ..vllm_glue.support import REFUSED
from .error import PlanError

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "half": 2, "float32": 4, "float": 4}


@dataclass(frozen=True)
class ModelShape:
    """Of the whole model, whatever it is split into."""

    name: str
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int  # tokens
    dtype: str
    weight_bytes: int
    weights_are_counted: bool  # from the architecture, for want of files

    @property
    def element_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    def kv_heads_of_rank(self, tensor_parallel: int) -> int:
        """As vLLM's `ModelConfig.get_num_kv_heads`: heads are copied where ranks outnumber them."""
        return max(1, self.num_kv_heads // tensor_parallel)


def read_model(model: str, dtype: str) -> ModelShape:
    """From a folder, a `config.json`, or a name: of `evaluation.real.models`, or one that
    transformers finds in its cache or on its hub.

    Args:
        dtype: `auto` for the model's own; vLLM halves one of 32 bits.

    Raises:
        PlanError: there is no such model, or the backend refuses it.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise PlanError(
            f"a model's configuration is read by transformers, which is missing ({error}): "
            "pip install transformers"
        ) from error
    fetched = models_folder() / full_name(model)  # `sentencekv eval get-model` has put it there
    path = fetched if fetched.is_dir() and not Path(model).exists() else Path(model)
    try:
        config = AutoConfig.from_pretrained(str(path.parent if path.is_file() else path))
    except (OSError, ValueError) as error:
        raise PlanError(
            f"MODEL must be a folder with config.json, that file, or a known name, got {model!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    text = config.get_text_config()
    _refuse(config, text)
    name = _dtype(text, dtype)
    folder = path.parent if path.is_file() else path
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    heads = text.num_attention_heads
    return ModelShape(
        name=str(path) if path == fetched else model,
        num_layers=text.num_hidden_layers,
        num_query_heads=heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        max_context=text.max_position_embeddings,
        dtype=name,
        weight_bytes=files or _parameters(config) * DTYPE_BYTES[name],
        weights_are_counted=not files,
    )


def _dtype(text: Any, dtype: str) -> str:
    own = str(getattr(text, "dtype", None) or "bfloat16").removeprefix("torch.")
    chosen = ("bfloat16" if own == "float32" else own) if dtype == "auto" else dtype
    if chosen not in DTYPE_BYTES:
        known = ", ".join(("auto", *DTYPE_BYTES))
        raise PlanError(f"--dtype must be one of {known}, got {chosen!r}: name another")
    return chosen


def _refuse(config: Any, text: Any) -> None:
    """What a server would refuse by its configuration, in the same words, and what has layers
    of several kinds, whose memory is not counted here."""
    kinds = set(getattr(text, "layer_types", None) or ())
    found = {
        "MLA": getattr(text, "kv_lora_rank", None),
        "encoder-decoder": getattr(config, "is_encoder_decoder", False),
        "hybrid": kinds - {"full_attention", "sliding_attention"},
    }
    for key, value in found.items():
        if value:
            raise PlanError(REFUSED[key].refusal(None))
    window = getattr(text, "sliding_window", None) or text.max_position_embeddings
    windowed = getattr(text, "use_sliding_window", True) and kinds != {"full_attention"}
    if windowed and window < text.max_position_embeddings:
        raise PlanError(
            f"MODEL must have full attention in every layer for its sizes to be counted, got "
            f"windows of {window} tokens: start the server, which logs what it holds"
        )


def _parameters(config: Any) -> int:
    """Of the architecture, counted without making a tensor."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return int(model.num_parameters())
