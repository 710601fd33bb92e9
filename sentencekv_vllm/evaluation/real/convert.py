# SPDX-License-Identifier: Apache-2.0
"""A GGUF file to a Hugging Face folder: `python -m ...convert FILE FOLDER`, with gguf on its path.

In a process of its own: transformers looks for its optional packages once, when it is imported.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

PROBE = "The capital of France is"
PROBE_TOKENS = 8


def convert(gguf: Path, target: Path) -> None:
    """Write weights in bfloat16, tokenizer and chat template.

    Raises:
        ValueError: the model cannot go on with a sentence.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # The folder holds plain weights: nothing must quantize them again.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    if model.config.model_type.startswith("gemma"):
        _add_bos(tokenizer)  # the loader forgets that the file asks for it
    prompt = tokenizer(PROBE, return_tensors="pt")
    reply = model.generate(**prompt, max_new_tokens=PROBE_TOKENS, do_sample=False)[0]
    text = tokenizer.decode(reply, skip_special_tokens=True)
    if "Paris" not in text:
        raise ValueError(f"{gguf} does not become a model that knows Paris: it says {text!r}")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _add_bos(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    token = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A $B",
        special_tokens=[(token, tokenizer.bos_token_id)],
    )


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
