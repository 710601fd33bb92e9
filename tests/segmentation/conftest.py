# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of the kinds that models come with, small enough to train on the spot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import sentencekv_vllm
from sentencekv_vllm.segmentation.base import TokenIds
from sentencekv_vllm.segmentation.vocabulary import Vocabulary

CORPUS = [
    'Dr. Smith met Prof. Jones, e.g. in the U.S. or on St. Paul St. at 3.5 p.m. "Really?" he said.',
    "It cost $3.50!\n\nSee No. 5, i.e. fig. 2 of v1.2.3 at http://example.org/a.b?c=d or file.txt.",
    "def f(x):\n    return x.y != 3\n\n\nclass A:\n    pass\n",
    '{"a": 1.5, "b": ["x. y", "z"]}\n| a | b |\n|---|---|\n| 1.0 | 2.0 |\n1. First.\n2. Second.\n',
    "你好。我是一个人！好吗？「是。」他说。",
    "Wait... what?! He said (quietly.) Then no. (Yes.) The end.)\n",
] * 3


@dataclass(frozen=True)
class Coded:
    """A tokenizer and its vocabulary; special tokens are not added."""

    tokenizer: Tokenizer
    vocabulary: Vocabulary

    def encode(self, text: str) -> TokenIds:
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def sentences(self, token_ids: TokenIds, ends: np.ndarray) -> list[str]:
        starts = np.append(0, ends)[:-1]
        return [
            self.vocabulary.text(token_ids[a:b]).decode(errors="replace")
            for a, b in zip(starts, ends, strict=True)
        ]

    def expected(self, token_ids: TokenIds, sentences: list[str]) -> list[str]:
        """Return the sentences as tokens can tell them apart: with the last token whole."""
        byte_ends = self.vocabulary.byte_ends(token_ids)
        lengths = [len(sentence.encode()) for sentence in sentences]
        added = self.vocabulary.text(token_ids).startswith(b" ")  # SentencePiece adds a space
        ends = np.searchsorted(byte_ends, np.cumsum(lengths, dtype=int) + added) + 1
        return self.sentences(token_ids, ends)


def byte_level(vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    """Words start with U+2581, and bytes stand in for characters the vocabulary lacks."""
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # A newline is a byte there, not a character of the alphabet.
    lines = [line for text in CORPUS for line in text.split("\n")]
    trained.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    tokenizer = Tokenizer(trained.model)  # without the bytes marked as special
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(special[:3])
    return tokenizer


def recall() -> Tokenizer:
    folder = Path(sentencekv_vllm.__path__[0]) / "assets" / "tiny-recall"
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


MAKERS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte_level": lambda: byte_level(600),
    "single_bytes": lambda: byte_level(258),  # no merges: every CJK mark takes three tokens
    "metaspace": metaspace,
    "recall": recall,
}


@pytest.fixture(scope="session", params=MAKERS)
def coded(request: pytest.FixtureRequest) -> Coded:
    tokenizer = MAKERS[request.param]()
    return Coded(tokenizer, Vocabulary.from_tokenizer(tokenizer))


@pytest.fixture(scope="session")
def byte_coded() -> Coded:
    tokenizer = byte_level(600)
    return Coded(tokenizer, Vocabulary.from_tokenizer(tokenizer))
