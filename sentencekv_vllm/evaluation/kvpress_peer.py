# SPDX-License-Identifier: Apache-2.0
"""The same questions to kvpress (https://github.com/NVIDIA/kvpress) on Hugging Face transformers.

A press drops tokens at the end of the prefill, which is exact under all of them: so one prefill of
the whole prompt, question included, serves every press, and each then decodes on what it kept.
kvpress wants an older transformers than vLLM: it runs in an environment of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import torch
import transformers
from torch import Tensor

from .items import Item
from .variant import DENSE

WINDOW = 32  # observation window, tokens (SnapKV's paper)

PRESSES: dict[str, Callable[[float], Any]] = {
    "SnapKV": lambda ratio: kvpress.SnapKVPress(ratio, window_size=WINDOW, kernel_size=5),
    # Its own beta of 20 asks for budgets of 20 windows and falls back to SnapKV below.
    "PyramidKV": lambda ratio: kvpress.PyramidKVPress(
        ratio, window_size=WINDOW, kernel_size=5, beta=5
    ),
    "TOVA": lambda ratio: kvpress.TOVAPress(ratio),
    "ChunkKV": lambda ratio: kvpress.ChunkKVPress(
        kvpress.SnapKVPress(ratio, window_size=WINDOW), chunk_length=16
    ),
    "ExpectedAttention": lambda ratio: kvpress.ExpectedAttentionPress(ratio),
    "KeyDiff": lambda ratio: kvpress.KeyDiffPress(ratio),
    "Knorm": lambda ratio: kvpress.KnormPress(ratio),
    "StreamingLLM": lambda ratio: kvpress.StreamingLLMPress(ratio, n_sink=WINDOW),
    "Random": lambda ratio: kvpress.RandomPress(ratio, seed=0),
}
"""Made of the share of the prompt to drop, per KV head."""

VERSIONS = {
    "kvpress": version("kvpress"),
    "transformers": transformers.__version__,
    "torch": torch.__version__,
}


@dataclass
class _Branches(kvpress.BasePress):
    """Lets each of several presses compress the same prefill, and leaves the cache as it is."""

    presses: Mapping[str, Any]
    kept: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def post_init_from_model(self, model: Any) -> None:
        for press in self.presses.values():
            press.post_init_from_model(model)

    def compress(
        self,
        module: Any,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        for name, press in self.presses.items():
            found = press.compress(module, hidden_states, keys, values, attentions, kwargs)
            self.kept.setdefault(name, []).append(found)
        return keys, values


@dataclass(frozen=True)
class PeerReply:
    """One greedy answer on what a press kept."""

    text: str
    output_tokens: int
    kept_tokens: float  # of the prompt, mean over layers and KV heads


class KVPressPeer:
    """A model in transformers, decoded greedily under several presses."""

    def __init__(self, model: Path) -> None:
        torch.set_num_threads(1)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()

    def count_tokens(self, text: str) -> int:
        """Without begin-of-text."""
        return len(self._tokens(text))

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    @torch.inference_mode()
    def answer(
        self, item: Item, budgets: Sequence[int], names: Sequence[str]
    ) -> dict[tuple[str, int | None], PeerReply]:
        """Replies by press and budget, and that of the whole cache under `DENSE`.

        Args:
            item: a question, or a session in one request.
            budgets: tokens of the prompt kept per KV head.
            names: of `PRESSES`.
        """
        prompt = [self._tokenizer.bos_token_id, *self._tokens(item.prompt)]
        forced = self._tokens(item.forced) if item.forced else []
        # Half a token more, since presses round down.
        branches = _Branches(
            {
                f"{name} {budget}": PRESSES[name](1 - (budget + 0.5) / len(prompt))
                for name in names
                for budget in budgets
            }
        )
        cache = transformers.DynamicCache()
        with branches(self._model):
            logits = self._model(
                torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1
            ).logits
        replies: dict[tuple[str, int | None], PeerReply] = {}
        for name in names:
            for budget in budgets:
                pairs = branches.kept.pop(f"{name} {budget}")
                replies[name, budget] = self._decode(
                    pairs, logits, len(prompt), forced, item.max_tokens
                )
        whole = [(layer.keys, layer.values) for layer in cache.layers]
        replies[DENSE, None] = self._decode(whole, logits, len(prompt), forced, item.max_tokens)
        return replies

    def _decode(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        logits: Tensor,
        position: int,
        forced: Sequence[int],
        max_tokens: int,
    ) -> PeerReply:
        """Greedy, with positions that go on from the prompt's, not from what was kept."""
        cache = transformers.DynamicCache()
        for layer, (keys, values) in enumerate(pairs):
            cache.update(keys, values, layer)
        output: list[int] = []
        for step in range(len(forced) + max_tokens):
            token = forced[step] if step < len(forced) else int(logits[0, -1].argmax())
            output.append(token)
            if step >= len(forced) and token == self._tokenizer.eos_token_id:
                break
            logits = self._model(
                torch.tensor([[token]]),
                past_key_values=cache,
                position_ids=torch.tensor([[position + step]]),
            ).logits
        return PeerReply(
            text=self._tokenizer.decode(output[len(forced) :], skip_special_tokens=True),
            output_tokens=len(output),
            kept_tokens=sum(keys.shape[2] for keys, _ in pairs) / len(pairs),
        )
