# SPDX-License-Identifier: Apache-2.0
"""The table ends sentences where a reader would, whatever the tokenizer."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sentencekv_vllm.segmentation.lengths import SentenceLengths
from sentencekv_vllm.segmentation.punctuation import PunctuationSegmenter

ANY_LENGTH = SentenceLengths(1, 1_000_000)

# Each sentence of a text; their concatenation is the text.
CASES = {
    "plain": ["One two.", " Three!", " Four?", " Five"],
    "empty": [],
    "one_token": ["a"],
    "no_marks": ["no marks at all here"],
    "only_marks": ["...!?"],
    "repeated_marks": ["Really?!", " Yes...", " Oh!!!", " Fine."],
    "ellipsis_character": ["Wait…", " What?"],
    "quotes": ['"Quite."', ' He said "no."', " (Yes.)", " Then [more.]", " End"],
    "curly_quotes": ["“Quite.”", " He left."],
    "opening_quote": ["He left.", ' "Where to?"', " she said."],
    "titles": ["Dr. Smith, Mr. Li, Mrs. Ha, Ms. B. and Prof. Jones came.", " All left."],
    "latin": ["Fruit, e.g. pears, i.e. food, vs. nuts etc. are here.", " Good."],
    "capitals": ["MR. Smith came.", " DR. No too."],
    "initials": ["J. R. R. Tolkien and J.K. Rowling met.", " Fine."],
    "states": ["In the U.S. and the U.K. it rains.", " Often."],
    "hours": ["At 5 p.m. or 6 a.m. we met.", " Late."],
    "firms": ["Acme Inc. and Ltd. Co. on St. Paul St. closed.", " Sad."],
    "numbered": ["See No. 5 and fig. 3, vol. 2.", " He said no.", " Then he left."],
    "longer_words": ["The memo.", " A disco.", " My piano.", " A fast.", " End."],
    "decimals": ["It is 3.5 or 1.25.", " Or $3.50!", " In 1999.", " Yes."],
    "versions": ["Use v1.2.3 or 2.0.1.", " Not 3."],
    "addresses": ["At http://example.org/a.b?c=d!e now.", " Read file.txt or a.b today."],
    "list": ["\n", "1. First item.\n", "2. Second item.\n", "10. Tenth item."],
    "lines": ["A line\n", "another line\n\n\n", "a third.\n", "end"],
    "code": ["def f(x):\n", "    return x.y != 3\n\n\n", "class A:\n", "    pass\n"],
    "quote_opens_line": ["He left.\n", '"Where?"', " she said."],
    "json": ['{"a": 1.5, "b": ["x.y", "z!"], "c": {"d": null}}'],
    "table": ["| a | b |\n", "|---|---|\n", "| 1.0 | 2.5 |\n"],
    "chinese": ["你好。", "我是一个人！", "好吗？", "「是。」", "他说。"],
    "hindi": ["यह है।", " वह है।", " हाँ"],
    "arabic": ["كيف؟", " نعم."],
    "opening_brackets": ["He left.", " (Where to?)", " [Away.]", " ‘So?’"],
    "ethiopic": ["ሰላም ነው፧", "አዎ።", " ሂድ"],
    "tibetan": ["བཀྲ་ཤིས།", " བདེ་ལེགས།"],
    "full_width_stop": ["これは文である．", "次の文．"],
    "double_marks": ["Really⁇", " Yes‼", "No⁈", "So⁉", " End"],
    "form_feed": ["Page one\f", "Page two\x85", "the end"],
    "emoji": ["Wow 😀!", " 😀😀.", " Ok 👩‍👩‍👧."],
}


@pytest.mark.parametrize("name", CASES)
def test_sentences(coded, name):
    token_ids = coded.encode("".join(CASES[name]))
    ends = PunctuationSegmenter(ANY_LENGTH, coded.vocabulary).split(token_ids)
    assert coded.sentences(token_ids, ends) == coded.expected(token_ids, CASES[name])


def test_turns_of_a_chat_are_separate(byte_coded):
    tokenizer = byte_coded.tokenizer
    text = "<|begin|>user\n\nHi there<|end|><|begin|>model\n\nHello.<|end|>"
    token_ids = np.array(tokenizer.encode(text).ids, np.int32)
    ends = PunctuationSegmenter(ANY_LENGTH, byte_coded.vocabulary).split(token_ids)
    pieces = np.split(token_ids, ends[:-1])
    turns = [tokenizer.decode(p.tolist(), skip_special_tokens=False) for p in pieces]
    assert turns == [
        "<|begin|>",
        "user\n\n",
        "Hi there<|end|><|begin|>",
        "model\n\n",
        "Hello.<|end|>",
    ]


WORDS = st.sampled_from(
    ["Dr", "no", "No", "e.g", "U.S", "J", "3", "10", "word", "你", "😀", "a.b", "<|end|>"]
    + [
        ".",
        "!",
        "?",
        "...",
        "。",
        "！",
        "…",
        ")",
        '"',
        "”",
        " ",
        " ",
        " ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
    ]
)


@settings(deadline=None)
@given(words=st.lists(WORDS, max_size=60))
def test_sentences_tile_any_text(coded, words):
    token_ids = coded.encode("".join(words))
    ends = PunctuationSegmenter(SentenceLengths(4, 16), coded.vocabulary).split(token_ids)
    lengths = np.diff(ends, prepend=0)
    assert ends.dtype == np.int32
    assert lengths.sum() == len(token_ids)
    assert ((lengths > 0) & (lengths <= 16)).all()
    assert (lengths[:-1] >= 4).all()


@settings(deadline=None)
@given(words=st.lists(WORDS, max_size=40), data=st.data())
def test_marks_seen_stay_as_more_text_comes(coded, words, data):
    segmenter = PunctuationSegmenter(ANY_LENGTH, coded.vocabulary)
    token_ids = coded.encode("".join(words))
    seen = data.draw(st.integers(0, len(token_ids)))
    sealed = segmenter.marks(token_ids[:seen], final=False)
    whole = segmenter.marks(token_ids, final=True)
    assert sealed.tolist() == whole[: sealed.size].tolist()


@settings(deadline=None)
@given(words=st.lists(WORDS, max_size=40))
def test_a_sentence_ends_in_a_run_with_a_boundary_token(coded, words):
    segmenter = PunctuationSegmenter(ANY_LENGTH, coded.vocabulary)
    token_ids = coded.encode("".join(words))
    boundary = segmenter.boundary_tokens[token_ids]
    start = 0
    for end in segmenter.marks(token_ids, final=True).tolist():
        assert boundary[start:end].any()
        start = end


def test_a_sentence_is_sealed_by_the_token_after_it(byte_coded):
    segmenter = PunctuationSegmenter(SentenceLengths(2, 1000), byte_coded.vocabulary)
    token_ids = byte_coded.encode("Then he left. He")
    (sentence,) = segmenter.split(token_ids, final=False)
    assert segmenter.split(token_ids[:sentence], final=False).size == 0
    assert segmenter.split(token_ids[: sentence + 1], final=False).tolist() == [sentence]


@pytest.mark.parametrize("mark", [".", "!", "?", "\n"])
def test_tokens_with_a_mark_are_boundary_tokens(coded, mark):
    segmenter = PunctuationSegmenter(ANY_LENGTH, coded.vocabulary)
    assert segmenter.boundary_tokens.shape == (coded.vocabulary.num_tokens,)
    assert segmenter.boundary_tokens[coded.encode(f"a{mark}")[-1]]
    assert not segmenter.boundary_tokens[coded.encode("a")[-1]]


def test_ids_beyond_the_vocabulary_are_no_error(coded):
    segmenter = PunctuationSegmenter(ANY_LENGTH, coded.vocabulary)
    beyond = np.array([coded.vocabulary.num_tokens, 2**31 - 1], np.int32)
    token_ids = np.concatenate([beyond, coded.encode("One. Two."), beyond])
    assert segmenter.split(token_ids)[-1] == len(token_ids)


def least_thread_time(work, runs):
    times = []
    for _ in range(runs):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return min(times)


def test_128k_tokens_cost_little_beside_making_a_list_of_them_an_array(byte_coded):
    """What each prompt pays anyway is the yardstick: seconds say more of the machine."""
    segmenter = PunctuationSegmenter(SentenceLengths(4, 64), byte_coded.vocabulary)
    text = "Dr. Smith met Prof. Jones on St. Paul St. at 3.5 p.m. He said (quietly.) The end.\n"
    token_ids = np.resize(byte_coded.encode(text), 131_072)
    listed = token_ids.tolist()
    array = least_thread_time(lambda: np.array(listed, np.int32), 9)
    split = least_thread_time(lambda: segmenter.split(token_ids), 9)
    assert split < 3 * array, (split, array)
