# SPDX-License-Identifier: Apache-2.0
"""The pieces of a prompt's tokens are its text."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sentencekv_vllm.segmentation.vocabulary import SPECIAL_PIECE, Vocabulary

TEXTS = [
    "",
    "a",
    "Plain words, and  two spaces.",
    "Emoji 😀👩‍👩‍👧 and accents é, naïve.",
    "你好。我是一个人！",
    'def f(x):\n\treturn {"a": 1.5}\r\n',
    "<0x0A> is not a newline here, nor is <s>x a token.",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(coded, text):
    if "<s>" in text:
        text = text.replace("<s>", "< s >")  # the tokenizers know that one as special
    token_ids = coded.encode(text)
    joined = coded.vocabulary.text(token_ids).decode()
    assert joined.removeprefix(" ") == text.removeprefix(" ")  # SentencePiece adds one


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_byte_level_pieces_join_to_any_text(byte_coded, text):
    if "<|" not in text:
        assert byte_coded.vocabulary.text(byte_coded.encode(text)).decode() == text


def test_byte_ends_are_where_the_pieces_end(coded):
    token_ids = coded.encode("One. 你好。 Two 😀.")
    ends = [len(coded.vocabulary.text(token_ids[: n + 1])) for n in range(len(token_ids))]
    assert coded.vocabulary.byte_ends(token_ids).tolist() == ends


def test_special_tokens_separate(coded):
    added = coded.tokenizer.get_added_tokens_decoder()
    assert added
    for token_id, token in added.items():
        assert token.special
        assert coded.vocabulary.piece(token_id) == SPECIAL_PIECE


def test_added_tokens_that_are_not_special_are_their_text(byte_coded):
    tokenizer = Tokenizer.from_str(byte_coded.tokenizer.to_str())
    tokenizer.add_tokens(["<think>"])
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    assert vocabulary.piece(tokenizer.token_to_id("<think>")) == b"<think>"


def test_ids_beyond_the_vocabulary_are_empty(coded):
    known = coded.encode("One.")
    beyond = np.array([coded.vocabulary.num_tokens, 2**31 - 1], np.int32)
    text = coded.vocabulary.text(np.concatenate([known, beyond, known]))
    assert text == 2 * coded.vocabulary.text(known)


def test_transformers_tokenizers_are_read_alike(coded):
    transformers = pytest.importorskip("transformers")
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=coded.tokenizer)
    assert Vocabulary.from_tokenizer(wrapped).pieces() == coded.vocabulary.pieces()


def test_other_tokenizers_are_read_by_decoding():
    words = {"[UNK]": 0, "un": 1, "##do": 2, "it": 3, ".": 4}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    token_ids = np.array(tokenizer.encode("undo it").ids, np.int32)
    assert vocabulary.text(token_ids) == b" undo it"


def test_a_vocabulary_of_128k_is_read_in_two_seconds():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [f"Ġ{a}{b}{n}" for a in "abcdefgh" for b in "abcdefgh" for n in range(2000)]
    model = models.BPE({token: n for n, token in enumerate(tokens)}, [])
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.ByteLevel()
    assert tokenizer.get_vocab_size() >= 128_000
    start = time.process_time()
    Vocabulary.from_tokenizer(tokenizer)
    assert time.process_time() - start < 2


def test_a_token_added_behind_the_tokenizers_vocabulary_is_known(byte_coded):
    tokenizer = Tokenizer.from_str(byte_coded.tokenizer.to_str())
    before = tokenizer.get_vocab()
    tokenizer.add_tokens(["<late>"])
    late = tokenizer.token_to_id("<late>")
    assert late not in before.values()

    class Cached:
        """vLLM keeps the vocabulary that it saw first."""

        backend_tokenizer = tokenizer

        def get_vocab(self):
            return before

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    assert Vocabulary.from_tokenizer(Cached()).piece(late) == b"<late>"
