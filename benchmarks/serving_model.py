# SPDX-License-Identifier: Apache-2.0
"""What is served, and the prompts it is given."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import decode_step
from gpu_engine import LLAMA_8B, TINY_RECALL

from sentencekv_vllm.evaluation.recall_tasks import RecallPrompt, is_correct, make_prompt

END_OF_SENTENCE = 10  # token "." of the made-up vocabulary
FIRST_WORD = 64
SENTENCE_TOKENS = (12, 44)
WITHOUT_WEIGHTS = {
    "llama-4l": decode_step.MODEL | {"hidden_size": 512, "intermediate_size": 1024},
    "llama-3.1-8b": LLAMA_8B,
}
"""Configs of models that are served with random weights."""


@dataclass(frozen=True)
class Prompt:
    """One request's token ids, and the question they hold where they hold one."""

    ids: list[int]
    question: RecallPrompt | None = None

    def is_answered_by(self, text: str) -> bool:
        """Whether a greedy reply, decoded past its end, is the expected one."""
        assert self.question is not None
        return is_correct(text.partition("</s>")[0], self.question)


class Model:
    """A folder that vLLM can serve without a network, with its tokenizer."""

    def __init__(self, name: str, scratch: Path) -> None:
        """Find it, or write it.

        Args:
            name: `tiny-recall` (embedded), one of `WITHOUT_WEIGHTS`, or the folder of a model
                with weights.
            scratch: existing folder for a model that has to be written.

        Raises:
            ValueError: no such model.
        """
        self.name = name
        self.has_weights = name not in WITHOUT_WEIGHTS
        if name == "tiny-recall":
            self.folder = TINY_RECALL
        elif not self.has_weights:
            self.folder = scratch / name
            write_random_model(self.folder, WITHOUT_WEIGHTS[name])
        else:
            self.folder = Path(name)
            self.name = self.folder.name
        if not (self.folder / "config.json").is_file():
            raise ValueError(
                f"no model {name!r}: give tiny-recall, {', '.join(WITHOUT_WEIGHTS)} or a folder "
                "with a config.json (nothing is downloaded)"
            )
        config = json.loads((self.folder / "config.json").read_text())
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads", heads)
        self.max_tokens: int = config["max_position_embeddings"]
        self.token_bytes = 2 * 2 * config["num_hidden_layers"] * kv_heads * head_dim
        """K and V of one token in all layers, 16 bits each."""
        self._vocabulary: int = config["vocab_size"]
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """vLLM's own loader; on first use, because importing vLLM takes seconds."""
        if self._tokenizer is None:
            from vllm.tokenizers import get_tokenizer

            self._tokenizer = get_tokenizer(str(self.folder))
        return self._tokenizer

    def prompt(self, tokens: int, seed: int) -> Prompt:
        """A prompt of at most `tokens` tokens that shares its beginning with no other seed's.

        Models with weights get a question of the recall tasks, others random words.
        """
        if not self.has_weights:
            return Prompt(random_sentences(tokens, self._vocabulary, seed))

        def count(text: str) -> int:
            return len(self.tokenizer(text, add_special_tokens=False).input_ids)

        question = make_prompt("niah_single", tokens - 1, seed, count)
        return Prompt(list(self.tokenizer(question.prompt).input_ids), question)


def random_sentences(tokens: int, vocabulary: int, seed: int) -> list[int]:
    """Random word ids in sentences of random lengths."""
    rng = random.Random(f"{tokens}/{seed}")
    ids: list[int] = []
    while len(ids) < tokens:
        words = rng.randint(*SENTENCE_TOKENS)
        ids += [rng.randrange(FIRST_WORD, vocabulary) for _ in range(words)] + [END_OF_SENTENCE]
    return ids[:tokens]


def write_random_model(folder: Path, config: dict[str, Any]) -> None:
    """A config and a tokenizer of one made-up word a token, for `--load-format dummy`."""
    from tokenizers import Tokenizer, decoders, models

    folder.mkdir(parents=True)
    special = {"bos_token_id": 0, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config | special))
    # Words begin with a space, as byte-level vocabularies write it, so that sentences are found.
    names = {f"\u0120w{i}": i for i in range(config["vocab_size"])}
    for i, name in ((0, "<s>"), (1, "</s>"), (END_OF_SENTENCE, ".")):
        del names[f"\u0120w{i}"]
        names[name] = i
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="."))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
