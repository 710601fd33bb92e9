# SPDX-License-Identifier: Apache-2.0
"""Mistral's own tokenizers: byte pieces make up characters, and control tokens are no text."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sentencekv_vllm.segmentation.lengths import SentenceLengths
from sentencekv_vllm.segmentation.punctuation import PunctuationSegmenter
from sentencekv_vllm.segmentation.vocabulary import SPECIAL_PIECE, Vocabulary

mistral_common = pytest.importorskip("mistral_common", reason="needs mistral_common")

FILES = ("tekken_240911.json", "mistral_instruct_tokenizer_240323.model.v3")
TEXT = "Un été à Paris. 😀 좋아요! Да.\n你好。我是一个人！ Zyx𐍈 ok."


@pytest.fixture(scope="module", params=FILES)
def mistral(request):
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    path = Path(mistral_common.__file__).parent / "data" / request.param
    if not path.exists():
        pytest.skip(f"this mistral_common brings no {request.param}")
    tokenizer = MistralTokenizer.from_file(str(path)).instruct_tokenizer.tokenizer
    # As vLLM wraps it: `tokenizer` is the one that knows the pieces.
    return tokenizer, Vocabulary.from_tokenizer(SimpleNamespace(tokenizer=tokenizer))


def test_pieces_join_to_the_text_and_none_vanishes(mistral):
    tokenizer, vocabulary = mistral
    token_ids = np.array(tokenizer.encode(TEXT, bos=False, eos=False), np.int32)
    assert vocabulary.text(token_ids).decode().removeprefix(" ") == TEXT
    assert all(vocabulary.pieces()[:-1]), "no token of the vocabulary is without text"


def test_control_tokens_separate_and_are_not_read(mistral):
    tokenizer, vocabulary = mistral
    for name in ("<s>", "</s>", "[INST]", "[/INST]"):
        assert vocabulary.piece(tokenizer.get_special_token(name)) == SPECIAL_PIECE
    assert vocabulary.piece(tokenizer.unk_id) == SPECIAL_PIECE


def test_sentences_end_where_their_marks_are(mistral):
    tokenizer, vocabulary = mistral
    token_ids = np.array(tokenizer.encode("Un été. 你好。 Oui!", bos=True, eos=True), np.int32)
    ends = PunctuationSegmenter(SentenceLengths(1, 1000), vocabulary).split(token_ids)
    texts = [vocabulary.text(part).decode().strip() for part in np.split(token_ids, ends[:-1])]
    assert [text for text in texts if text] == ["Un été.", "你好。", "Oui!"]


def test_a_tokenizer_that_cannot_be_read_is_a_warning(monkeypatch, caplog):
    vllm_tokenizers = pytest.importorskip("vllm.tokenizers", reason="vLLM is not installed")
    from sentencekv_vllm.vllm_glue.resolve import load_vocabulary

    class Odd:
        def get_vocab(self):
            raise NotImplementedError("pieces are a secret")

    monkeypatch.setattr(vllm_tokenizers, "cached_tokenizer_from_config", lambda config: Odd())
    config = SimpleNamespace(model_config=SimpleNamespace(skip_tokenizer_init=False))
    assert load_vocabulary(config) is None
    assert "Odd" in caplog.text and "pieces are a secret" in caplog.text
