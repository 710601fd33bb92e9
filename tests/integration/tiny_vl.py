# SPDX-License-Identifier: Apache-2.0
"""A Qwen2.5-VL of two layers with random weights, and prompts with an image for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def write_model(folder: Path, text_model: str) -> None:
    """Configuration, tokenizer (that of `text_model`) and weights, large enough to differ."""
    import torch
    from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(text_model)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.save_pretrained(folder)
    start, end, image, video = tokenizer.convert_tokens_to_ids(SPECIAL)
    ids = {
        "vision_start_token_id": start,
        "vision_end_token_id": end,
        "image_token_id": image,
        "video_token_id": video,
    }
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 1920,
            "hidden_size": 256,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "initializer_range": 0.1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [8, 12, 12],
            },
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 256,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.1,
        },
        initializer_range=0.1,
        tie_word_embeddings=False,
        **ids,
    )
    torch.manual_seed(5)
    model = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": 56 * 56,
        "max_pixels": 448 * 448,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def without_video() -> None:
    """Let the processor load where torchvision is missing: images go through PIL, and no test
    has a video."""
    from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLProcessor
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        return

    class NoVideo:
        merge_size, temporal_patch_size = 2, 2

    def load(cls: Any, folder: Any, *_: Any, **options: Any) -> Any:
        images = AutoImageProcessor.from_pretrained(folder, backend="pil")
        tokenizer = options.get("tokenizer") or AutoTokenizer.from_pretrained(folder)
        return cls(images, tokenizer, NoVideo())

    def accept(self: Any, name: str, argument: Any) -> Any:
        return type(argument)

    Qwen2_5_VLProcessor.from_pretrained = classmethod(load)
    Qwen2_5_VLProcessor.check_argument_for_proper_class = accept


def image(seed: int) -> Any:
    """336 x 336 random pixels: 144 placeholder tokens."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (336, 336, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompt(before: str, after: str, seed: int) -> dict[str, Any]:
    """Text, an image, text."""
    return {
        "prompt": before + IMAGE + after,
        "multi_modal_data": {"image": image(seed)},
    }
