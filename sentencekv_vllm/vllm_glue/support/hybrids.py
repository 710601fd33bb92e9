# SPDX-License-Identifier: Apache-2.0
"""Models with sliding-window and full layers that are served, by their model type.

A type is added with an engine test; `setup` refuses all others.
"""

from __future__ import annotations

from .entry import Entry, Kind

HYBRID = "tests/integration/test_hybrids.py"
HOW = (
    "full layers as in a dense model; windowed layers keep vLLM's backend and KV cache groups. A "
    "prompt must fit on the GPU (no visits). Run on CPUs only"
)


def _hybrid(model_type: str, examples: str) -> Entry:
    tests = (f"{HYBRID}::test_full_attention_gives_the_tokens_of_stock_attention[{model_type}]",)
    return Entry(
        f"sliding-window and full layers: `{model_type}`", Kind.SERVED, HOW, tests, "", examples
    )


HYBRIDS: dict[str, Entry] = {
    "gemma3_text": _hybrid("gemma3_text", "Gemma 3, its text"),
    "cohere2": _hybrid("cohere2", "Command-A, Command R7B"),
    "olmo3": _hybrid("olmo3", "OLMo 3"),
    "exaone4": _hybrid("exaone4", "EXAONE 4.0 32B"),
}
