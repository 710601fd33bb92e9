# SPDX-License-Identifier: Apache-2.0
"""Sentences tile the text within their bounds, whatever the marks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sentencekv_vllm.segmentation.fixed import FixedSegmenter
from sentencekv_vllm.segmentation.lengths import SentenceLengths


@st.composite
def texts(draw):
    """Bounds, a number of tokens, and marks in them."""
    least = draw(st.integers(1, 9))
    most = draw(st.integers(2 * least - 1, 30))
    num_tokens = draw(st.integers(0, 200))
    dense = draw(st.booleans())
    gap = st.integers(1, 4 if dense else 80)
    marks = np.cumsum(draw(st.lists(gap, max_size=80)), dtype=np.int32)
    return SentenceLengths(least, most), num_tokens, marks[marks <= num_tokens].astype(np.int32)


def join_one_by_one(marks, num_tokens, bounds):
    """The rule for short sentences, read aloud."""
    ends, start = [], 0
    for mark in marks.tolist():
        if mark - start >= bounds.min_tokens:
            ends.append(mark)
            start = mark
    if start < num_tokens:
        ends.append(num_tokens)
    return ends


def pieces(length, bounds):
    return -(-length // bounds.max_tokens)


@given(texts())
def test_sentences_tile_the_text_within_bounds(text):
    bounds, num_tokens, marks = text
    ends = bounds.fit(marks, num_tokens, final=True)
    lengths = np.diff(ends, prepend=0)
    assert ends.dtype == np.int32
    assert lengths.sum() == num_tokens
    assert (lengths > 0).all()
    assert (lengths <= bounds.max_tokens).all()
    assert (lengths[:-1] >= bounds.min_tokens).all()


@given(texts())
def test_short_sentences_join_and_long_ones_are_cut_evenly(text):
    bounds, num_tokens, marks = text
    ends = set(bounds.fit(marks, num_tokens, final=True).tolist())
    joined = [0, *join_one_by_one(marks, num_tokens, bounds)]
    if len(joined) > 2 and joined[-1] - joined[-2] < bounds.min_tokens:
        with_last, without = joined[-1] - joined[-3], joined[-2] - joined[-3]
        if pieces(with_last, bounds) == pieces(without, bounds):
            del joined[-2]
    assert set(joined[1:]) <= ends
    for start, end in zip(joined[:-1], joined[1:], strict=True):
        inner = np.diff(sorted({start, end} | {e for e in ends if start < e < end}))
        assert len(inner) == pieces(end - start, bounds)
        assert inner.max() - inner.min() <= 1


@given(texts(), st.data())
def test_sealed_sentences_stay_as_more_text_comes(text, data):
    bounds, num_tokens, marks = text
    seen = data.draw(st.integers(0, num_tokens))
    sealed = bounds.fit(marks[marks <= seen], seen, final=False)
    tail = seen - (int(sealed[-1]) if sealed.size else 0)
    assert 0 <= tail < bounds.max_tokens
    # A tail sealed by its length alone goes by the text seen; what a mark sealed stays.
    joined = join_one_by_one(marks[marks <= seen], seen, bounds)
    by_mark = [e for e in joined if e in marks[marks <= seen]]
    kept = sealed[sealed <= (by_mark[-1] if by_mark else 0)]
    assert kept.tolist() == bounds.fit(marks, num_tokens, final=False)[: kept.size].tolist()


def test_an_open_tail_is_sealed_in_full_lengths():
    assert SentenceLengths(2, 8).fit(np.array([5], np.int32), 24, final=False).tolist() == [
        5,
        13,
        21,
    ]


@pytest.mark.parametrize(("least", "most"), [(0, 8), (5, 8), (1, 0)])
def test_impossible_bounds_are_refused_with_the_fix(least, most):
    with pytest.raises(ValueError, match=r"must .* got .*: set "):
        SentenceLengths(least, most)


def test_the_suggested_maximum_is_accepted():
    SentenceLengths(5, 9)


@given(st.integers(0, 500), st.integers(4, 64))
def test_fixed_sentences_are_equal(num_tokens, length):
    lengths = np.diff(
        FixedSegmenter(SentenceLengths(4, 64), length).split(np.zeros(num_tokens, np.int32)),
        prepend=0,
    )
    assert lengths.sum() == num_tokens
    assert (lengths[:-2] == length).all()
    assert (lengths <= 64).all()


def test_fixed_leaves_the_open_tail_out():
    segmenter = FixedSegmenter(SentenceLengths(4, 64), 10)
    assert segmenter.split(np.zeros(29, np.int32), final=False).tolist() == [10, 20]


@pytest.mark.parametrize("length", [3, 65])
def test_fixed_length_lies_within_the_bounds(length):
    with pytest.raises(ValueError, match=f"got {length} for 4 to 64"):
        FixedSegmenter(SentenceLengths(4, 64), length)
