# SPDX-License-Identifier: Apache-2.0
"""spaCy's sentences, found in the pieces' text and given back in tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sentencekv_vllm.segmentation.lengths import SentenceLengths

pytest.importorskip("spacy", reason="needs spaCy")

from sentencekv_vllm.segmentation.spacy import SpacySegmenter  # noqa: E402

ANY_LENGTH = SentenceLengths(1, 1_000_000)

CASES = {
    "empty": [],
    "plain": ["One two.", " Three!", " Four?", " Five"],
    "abbreviations": ["Dr. Smith of the U.S. ate pears, e.g. two.", " Fine."],
    "decimals": ["It is 3.5 or 1.25.", " Read a.b at http://example.org/c.d."],
    "lines": ["A line\n", "another line.\n\n\n", "a third.\n", "end"],
    "quotes": ['He said "no."', " Then (quietly.)", " End"],
    "chinese": ["你好。", "我是一个人！", "好吗？", "「是。」", "他说。"],
    "emoji": ["Wow 😀!", " 😀😀.", " Ok"],
    "no_marks": ["no marks at all here"],
    "only_marks": ["...!?"],
}


@pytest.mark.parametrize("name", CASES)
def test_sentences(coded, name):
    token_ids = coded.encode("".join(CASES[name]))
    ends = SpacySegmenter(ANY_LENGTH, coded.vocabulary).split(token_ids)
    assert coded.sentences(token_ids, ends) == coded.expected(token_ids, CASES[name])


def test_chunks_change_nothing(byte_coded):
    text = "One two three. Four five six! A line\n" * 40
    token_ids = byte_coded.encode(text)
    whole = SpacySegmenter(ANY_LENGTH, byte_coded.vocabulary).split(token_ids)
    chunked = SpacySegmenter(ANY_LENGTH, byte_coded.vocabulary, chunk_chars=60).split(token_ids)
    assert chunked.tolist() == whole.tolist()


def test_chunks_without_sentences_are_cut_at_white_space(byte_coded):
    token_ids = byte_coded.encode("word " * 100 + "x" * 200)
    segmenter = SpacySegmenter(ANY_LENGTH, byte_coded.vocabulary, chunk_chars=60)
    assert segmenter.split(token_ids)[-1] == len(token_ids)


@pytest.fixture(scope="module")
def bounded(coded):
    return SpacySegmenter(SentenceLengths(4, 16), coded.vocabulary)


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_sentences_tile_any_tokens(bounded, coded, data):
    """Token ids drawn at random make up bytes that are no UTF-8."""
    highest = coded.vocabulary.num_tokens
    drawn = data.draw(st.lists(st.integers(0, highest), max_size=50))
    token_ids = np.array(drawn, np.int32)
    ends = bounded.split(token_ids)
    lengths = np.diff(ends, prepend=0)
    assert lengths.sum() == len(token_ids)
    assert ((lengths > 0) & (lengths <= 16)).all()


def test_sealed_sentences_stay_as_more_text_comes(byte_coded):
    segmenter = SpacySegmenter(ANY_LENGTH, byte_coded.vocabulary)
    token_ids = byte_coded.encode(
        'He said "no." Then (oddly.) v1.2 left\n\nfor good... U.S. or not.'
    )
    whole = segmenter.marks(token_ids, final=True)
    sizes = set()
    for seen in range(len(token_ids) + 1):
        sealed = segmenter.marks(token_ids[:seen], final=False)
        sizes.add(sealed.size)
        assert sealed.tolist() == whole[: sealed.size].tolist()
    assert max(sizes) == whole.size - 1
