# SPDX-License-Identifier: Apache-2.0
"""spaCy's sentences, found in the pieces' text and given back in tokens."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sentencekv_vllm.segmentation.lengths import SentenceLengths

spacy = pytest.importorskip("spacy", reason="needs spaCy")

from sentencekv_vllm.segmentation.spacy import SpacySegmenter  # noqa: E402
from sentencekv_vllm.segmentation.spacy_text import readable  # noqa: E402

ANY_LENGTH = SentenceLengths(1, 1_000_000)

CASES = {
    "empty": [],
    "plain": ["One two.", " Three!", " Four?", " Five"],
    "abbreviations": ["Dr. Smith of the U.S. ate pears, e.g. two.", " Fine."],
    "decimals": ["It is 3.5 or 1.25.", " Read a.b at http://example.org/c.d."],
    "lines": ["A line\n", "another line.\n\n\n", "a third.\n", "end"],
    "quotes": ['He said "no."', " Then (quietly.)", " End"],
    "chinese": ["你好。", "我是一个人！", "好吗？", "「是。」", "他说。"],
    "opening_brackets": ["He left.", " (Where to?)", " [Away.]", " ‘So?’"],
    "ethiopic": ["ሰላም ነው፧", "አዎ።", " ሂድ"],
    "tibetan": ["བཀྲ་ཤིས།", " བདེ་ལེགས།"],
    "full_width_stop": ["これは文である．", "次の文．"],
    "double_marks": ["Really⁇", " Yes‼", "No⁈", "So⁉", " End"],
    "form_feed": ["Page one\f", "Page two\x85", "the end"],
    "opening_quotes": ["He left.", ' "Where to?"', " “Home.”", " ¿Sí?", " End"],
    "figures": ["See fig. 2 and No. 5, vol. 3.", " See Fig.", " A dog, approx. two.", " End"],
    "emoji": ["Wow 😀!", " 😀😀.", " Ok"],
    "no_marks": ["no marks at all here"],
    "only_marks": ["...!?"],
}


@pytest.mark.parametrize("name", CASES)
def test_sentences(coded, name):
    token_ids = coded.encode("".join(CASES[name]))
    ends = SpacySegmenter(ANY_LENGTH, coded.vocabulary).split(token_ids)
    assert coded.sentences(token_ids, ends) == coded.expected(token_ids, CASES[name])


WALLS = {
    "marks": "!" * 60_000,
    "box drawing": "─│┌" * 20_000,
    "emoji": "😀" * 60_000,
    "dollars": "$" * 60_000,
    "brackets": "('" * 30_000,
    "underscores": "_" * 60_000,
    "letters": "x" * 60_000,
    "minified": "a.b;" * 15_000,
    "short runs": ("$" * 8 + " ") * 7_000,
    "runs as long as words may be": ("!" * 64 + " ") * 1_000,
}


@pytest.mark.parametrize("name", WALLS)
def test_a_wall_of_symbols_takes_work_that_grows_with_its_length(name):
    """At 60,000 marks spaCy alone takes minutes; of prose, 60,000 characters take 0.2 s."""
    nlp = spacy.blank("en")
    nlp.add_pipe("sentencizer")
    started = time.process_time()
    text = readable(WALLS[name] + "\nA word. Another.")
    assert len(text) == len(WALLS[name]) + 17
    with nlp.memory_zone():
        list(nlp(text).sents)
    assert time.process_time() - started < 20


def test_what_spacy_does_not_read_ends_no_sentence_and_hides_none(byte_coded):
    sentences = [f"Look {'=' * 30} here.", f" At {'x' * 200}.", " Go!!!!!!!!!!!!!!", " End."]
    sentences[2:2] = [f" See http://a.b/{'path/' * 40}file."]
    token_ids = byte_coded.encode("".join(sentences))
    ends = SpacySegmenter(ANY_LENGTH, byte_coded.vocabulary).split(token_ids)
    assert byte_coded.sentences(token_ids, ends) == byte_coded.expected(token_ids, sentences)


@given(text=st.text("ab1 .!?$_\n😀─你。'\"", max_size=300))
def test_what_spacy_reads_has_the_same_places(text):
    read = readable(text)
    assert len(read) == len(text)
    short = all(len(word) <= 8 for word in text.split())
    assert not short or read == text


def test_a_prompt_beyond_its_share_of_work_is_given_up(byte_coded, monkeypatch):
    from sentencekv_vllm.segmentation import spacy as module

    monkeypatch.setattr(module, "SECONDS", -1.0)
    segmenter = SpacySegmenter(ANY_LENGTH, byte_coded.vocabulary)
    with pytest.raises(module.TooMuchWork, match="0 of 15 characters"):
        segmenter.split(byte_coded.encode("One two. Three."))


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
