# SPDX-License-Identifier: Apache-2.0
"""Models, and kinds of layers, that are refused."""

from __future__ import annotations

from .entry import Entry, Kind
from .hybrids import HYBRIDS
from .refused_by_option import REFUSALS, START

LAYER = f"{REFUSALS}::test_layers_that_the_backend_cannot_serve_are_refused_not_replaced"
IMPL = f"{REFUSALS}::test_a_layer_with_alibi_or_a_shared_cache_is_refused"
OTHER_BACKEND = "use another attention backend for this model"

BY_MODEL: dict[str, Entry] = {
    "MLA": Entry(
        "multi-head latent attention (MLA)",
        Kind.AT_START,
        "its cache holds latents, not keys and values of a head",
        (f"{START}[MLA]", f"{LAYER}[MLA]"),
        OTHER_BACKEND,
        "DeepSeek, Kimi, GLM-5, Mistral-Large-3",
    ),
    "windows alone": Entry(
        "a sliding window in every layer",
        Kind.AT_START,
        "nothing lies behind the window that could be selected",
        (f"{START}[windows alone]", f"{REFUSALS}::test_a_sliding_window_model_is_refused"),
        "use another attention backend, or set --max-model-len to the window at most",
        "Mistral 7B v0.1, Phi-3-mini-4k",
    ),
    "other windows": Entry(
        "sliding-window and full layers of other model types",
        Kind.AT_START,
        f"they are lifted one by one, with an engine test; so far {', '.join(HYBRIDS)}",
        (f"{START}[other windows]",),
        OTHER_BACKEND,
        "gpt-oss, Gemma 2, Gemma 4, MiMo, Step, Llama 4",
    ),
    "untold window": Entry(
        "a windowed layer whose window the model's configuration does not tell",
        Kind.BY_LAYER,
        "it would be tracked as a layer that sees the whole past",
        (f"{REFUSALS}::test_a_layer_with_a_window_of_its_own_is_refused",),
        OTHER_BACKEND,
    ),
    "chunked attention": Entry(
        "chunked local attention",
        Kind.AT_START,
        "its chunks are local to layers which keep everything",
        (f"{START}[chunked attention]",),
        OTHER_BACKEND,
        "Llama 4",
    ),
    "hybrid": Entry(
        "hybrid, Mamba and attention-free models",
        Kind.AT_START,
        "vLLM zeroes their blocks before they are copied out, and a state is not a history",
        (f"{START}[hybrid]", f"{START}[Mamba]"),
        OTHER_BACKEND,
        "Qwen3-Next, Qwen3.5, Nemotron-3, Granite 4",
    ),
    "encoder-decoder": Entry(
        "encoder-decoder models",
        Kind.AT_START,
        "cross attention has no history that grows",
        (f"{START}[encoder-decoder]", f"{LAYER}[cross attention]"),
        OTHER_BACKEND,
    ),
    "runner": Entry(
        "runners other than text generation",
        Kind.AT_START,
        "pooling models decode nothing",
        (f"{START}[runner]", f"{LAYER}[encoder-only]"),
        OTHER_BACKEND,
    ),
    "several groups": Entry(
        "models whose full-attention layers are not one KV cache group",
        Kind.BY_CACHE,
        "blocks of one group are tracked, copied out and freed",
        (f"{REFUSALS}::test_full_layers_in_other_than_one_group_are_refused",),
        OTHER_BACKEND,
    ),
    "sinks": Entry(
        "learned attention sinks",
        Kind.BY_LAYER,
        "the sparse attention op has none in its denominator",
        (f"{LAYER}[learned sinks]",),
        OTHER_BACKEND,
        "gpt-oss, MiMo",
    ),
    "multimodal prefix": Entry(
        "attention in both directions inside an image (prefix-LM masks)",
        Kind.BY_LAYER,
        "the mask would have to be split with the batch",
        (f"{LAYER}[multimodal prefix]",),
        OTHER_BACKEND,
        "Gemma 3 with images, PaliGemma, Molmo 2",
    ),
    "non-causal": Entry(
        "non-causal attention",
        Kind.BY_LAYER,
        "a history is what came before",
        (f"{LAYER}[non-causal]",),
        OTHER_BACKEND,
    ),
    "indexer": Entry(
        "models with an indexer of their own",
        Kind.BY_LAYER,
        "they select already",
        (f"{LAYER}[a trained indexer]",),
        OTHER_BACKEND,
        "DeepSeek V3.2, MiniMax-M3",
    ),
    "head size": Entry(
        "head sizes other than 64, 80, 96, 112, 128, 160, 192, 224 and 256",
        Kind.BY_LAYER,
        "the kernels are built for these",
        (f"{LAYER}[head size]", f"{LAYER}[a head size that the stock op takes]"),
        OTHER_BACKEND,
    ),
    "ALiBi": Entry(
        "ALiBi",
        Kind.BY_LAYER,
        "a swapped-in block has no position in its table",
        (f"{IMPL}[ALiBi]",),
        OTHER_BACKEND,
    ),
    "shared KV": Entry(
        "layers that share another layer's KV cache",
        Kind.BY_LAYER,
        "each layer swaps in for itself",
        (f"{IMPL}[layers.3]",),
        OTHER_BACKEND,
        "Gemma 3n, Gemma 4 E2B and E4B",
    ),
    "soft-capping on CUDA": Entry(
        "logit soft-capping on CUDA",
        Kind.BY_LAYER,
        "the decode kernel has none; the CPU's op has",
        ("tests/integration/test_compatibility.py::test_soft_capping_is_refused_on_cuda",),
        OTHER_BACKEND,
        "Gemma 2",
    ),
    "zeroed blocks": Entry(
        "models whose KV blocks vLLM zeroes before use (mixed cache precisions)",
        Kind.BY_CACHE,
        "a freed block would be zeroed before it is copied out",
        ("tests/integration/test_compatibility.py::test_caches_that_vllm_zeroes_are_refused",),
        OTHER_BACKEND,
    ),
}
