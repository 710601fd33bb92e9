# SPDX-License-Identifier: Apache-2.0
"""The service answers every prompt, by spaCy where it keeps up, and says when it does not."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from sentencekv_vllm.segmentation import SegmentationService, spacy_process
from sentencekv_vllm.segmentation.lengths import SentenceLengths
from sentencekv_vllm.segmentation.punctuation import PunctuationSegmenter
from sentencekv_vllm.segmentation.spacy_process import MAX_CRASHES

LENGTHS = SentenceLengths(4, 64)
PATIENCE_S = 180.0  # spaCy's import on a busy machine
TEXT = "One sentence of words. Another one here.And right after it a third.\n" * 20

needs_spacy = pytest.mark.skipif(
    importlib.util.find_spec("spacy") is None, reason="spaCy is not installed"
)


@pytest.fixture
def make(byte_coded):
    """Build services that are closed when the test ends."""
    made = []

    def build(segmenter, vocabulary=byte_coded.vocabulary):
        service = SegmentationService(
            segmenter, vocabulary, min_sentence_tokens=4, max_sentence_tokens=64, fixed_length=16
        )
        made.append(service)
        return service

    yield build
    for service in made:
        service.close()


@pytest.fixture
def prompt(byte_coded):
    return byte_coded.encode(TEXT)


@pytest.fixture
def by_table(byte_coded, prompt):
    return PunctuationSegmenter(LENGTHS, byte_coded.vocabulary).split(prompt).tolist()


@pytest.fixture
def by_spacy(byte_coded, prompt):
    from sentencekv_vllm.segmentation.spacy import SpacySegmenter

    return SpacySegmenter(LENGTHS, byte_coded.vocabulary).split(prompt).tolist()


def gone(pid):
    return not Path(f"/proc/{pid}").exists()


def test_the_table_answers_at_once(make, prompt, by_table):
    service = make("punctuation")
    service.submit("a", prompt)
    assert service.poll("a").tolist() == by_table
    assert service.poll("a").tolist() == by_table
    assert service.stats == {"punctuation": 1}


def test_fixed_needs_no_tokenizer(make, prompt):
    service = make("fixed", vocabulary=None)
    service.submit("a", prompt)
    assert (np.diff(service.poll("a"))[:-2] == 16).all()
    assert service.stats == {"fixed": 1}
    assert not service.is_boundary(0)
    assert service.split_tail(prompt[:40]).tolist() == [16, 32]


def test_auto_without_a_tokenizer_is_fixed_and_says_so(make, prompt, caplog):
    with caplog.at_level(logging.WARNING, "sentencekv_vllm"):
        service = make("auto", vocabulary=None)
        for name in "ab":
            service.submit(name, prompt)
            assert service.poll(name) is not None
    assert service.stats == {"fixed": 2}
    assert len(caplog.records) == 1


@pytest.mark.parametrize("segmenter", ["spacy", "punctuation"])
def test_segmenters_of_text_need_a_tokenizer(make, segmenter):
    with pytest.raises(ValueError, match=f"'{segmenter}' .* needs a tokenizer.*: set segmenter"):
        make(segmenter, vocabulary=None)


def test_unknown_segmenters_are_refused(make):
    with pytest.raises(ValueError, match="must be one of auto, spacy, punctuation, fixed, got 'x'"):
        make("x")


def test_a_missing_spacy_is_an_error_for_those_who_asked_for_it(make, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed: pip install spacy"):
        make("spacy")
    make("auto")


def test_auto_is_the_table_whatever_the_load(make, prompt, by_table, caplog):
    """The same prompt has the same sentences: alone, behind others, and after any of them."""
    service = make("auto")
    for n in range(50):
        service.submit(str(n), prompt if n % 2 else np.tile(prompt, 20))
    answers = [service.poll(str(n)).tolist() for n in range(1, 50, 2)]
    assert answers == [by_table] * 25
    assert service.stats == {"punctuation": 50} and service.spacy_pid is None
    assert not caplog.records


def test_a_request_is_submitted_once_until_dropped(make, prompt):
    service = make("punctuation")
    service.submit("a", prompt)
    with pytest.raises(ValueError, match="drop it first"):
        service.submit("a", prompt)
    service.drop("a")
    service.drop("a")
    with pytest.raises(KeyError):
        service.poll("a")
    service.submit("a", prompt)


def test_boundaries_of_generated_tokens(make, byte_coded):
    service = make("punctuation")
    token_ids = byte_coded.encode("Then he left for good. He")
    boundaries = [n for n, t in enumerate(token_ids.tolist()) if service.is_boundary(t)]
    (end,) = service.split_tail(token_ids)
    assert boundaries == [end - 1]
    assert service.split_tail(token_ids, final=True)[-1] == len(token_ids)
    assert not service.is_boundary(byte_coded.vocabulary.num_tokens + 5)


@needs_spacy
def test_spacy_answers_in_its_process(make, prompt, by_spacy, by_table):
    service = make("spacy")
    empty = np.empty(0, np.int32)
    service.submit("a", prompt)
    service.submit("b", empty)
    service.submit("c", prompt[:1])
    assert by_spacy != by_table
    assert service.wait("a", PATIENCE_S).tolist() == by_spacy
    assert service.wait("b", PATIENCE_S).tolist() == []
    assert service.wait("c", PATIENCE_S).tolist() == [1]
    assert service.poll("a").tolist() == by_spacy
    assert service.stats == {"spacy": 3}


@needs_spacy
def test_spacy_starts_at_the_first_prompt_and_ends_with_close(make, prompt):
    service = make("spacy")
    assert service.spacy_pid is None
    service.submit("a", prompt)
    service.wait("a", PATIENCE_S)
    pid = service.spacy_pid
    assert not gone(pid)
    service.close()
    assert gone(pid)
    service.close()


@needs_spacy
def test_closing_amid_a_prompt_leaves_no_process_and_an_answer(make, prompt, by_table):
    service = make("spacy")
    service.submit("a", prompt)
    service.wait("a", PATIENCE_S)
    pid = service.spacy_pid
    long = np.tile(prompt, 500)
    service.submit("b", long)
    service.submit("c", prompt)
    service.close()
    assert gone(pid)
    assert service.poll("b")[-1] == len(long)
    assert service.poll("c").tolist() == by_table
    service.submit("after", prompt)
    assert service.poll("after").tolist() == by_table
    assert service.stats == {"spacy": 1, "spacy_failed": 3, "punctuation": 3}


@needs_spacy
def test_a_crash_costs_its_prompt_and_no_other(make, prompt, by_spacy, by_table, caplog):
    """More of them than the process may fail to start: a client cannot switch spaCy off."""
    service = make("spacy")
    service.submit("a", prompt)
    service.wait("a", PATIENCE_S)
    with caplog.at_level(logging.WARNING, "sentencekv_vllm"):
        for crash in range(MAX_CRASHES + 1):
            os.kill(service.spacy_pid, signal.SIGKILL)
            service.submit(f"killed {crash}", prompt)
            assert service.wait(f"killed {crash}", PATIENCE_S).tolist() == by_table
            service.submit(f"next {crash}", prompt)
            assert service.wait(f"next {crash}", PATIENCE_S).tolist() == by_spacy
    assert service.stats["spacy_failed"] == MAX_CRASHES + 1
    assert len(caplog.records) == 1


@needs_spacy
def test_a_process_that_does_not_come_up_is_given_up(make, prompt, by_table, monkeypatch):
    monkeypatch.setattr(spacy_process.sys, "executable", "/bin/false")
    service = make("spacy")
    for n in range(MAX_CRASHES + 2):
        service.submit(str(n), prompt)
        assert service.wait(str(n), PATIENCE_S).tolist() == by_table
    assert service.stats["spacy_failed"] == MAX_CRASHES + 2
    assert service.spacy_pid is None


@needs_spacy
def test_a_process_that_hangs_costs_its_prompt_and_no_other(
    make, prompt, by_spacy, by_table, monkeypatch
):
    service = make("spacy")
    service.submit("a", prompt)
    service.wait("a", PATIENCE_S)
    os.kill(service.spacy_pid, signal.SIGSTOP)
    monkeypatch.setattr(spacy_process, "_BASE_S", 0.1)
    service.submit("hangs", prompt)
    assert service.wait("hangs", PATIENCE_S).tolist() == by_table
    monkeypatch.undo()
    service.submit("next", prompt)
    assert service.wait("next", PATIENCE_S).tolist() == by_spacy


@needs_spacy
def test_prompts_whose_prefill_is_over_go_first(make, prompt):
    service = make("spacy")
    long = np.tile(prompt, 200)
    for name in ("first", "second", "third"):
        service.submit(name, long)
    service.submit("urgent", prompt)
    while service.poll("urgent", urgent=True) is None:
        time.sleep(0.01)
    assert service.poll("third") is None


@needs_spacy
def test_a_wall_of_marks_holds_up_nobody(make, byte_coded, prompt, by_spacy):
    service = make("spacy")
    service.submit("warm", prompt)
    service.wait("warm", PATIENCE_S)
    service.submit("wall", byte_coded.encode("!" * 60_000))
    service.submit("a", prompt)
    assert service.wait("a", PATIENCE_S).tolist() == by_spacy
    assert service.stats["spacy"] == 2, "the wall has an answer by then, too"
    assert service.poll("wall") is not None and service.stats == {"spacy": 3}


@needs_spacy
def test_warming_up_starts_the_process_and_answers_nothing(make, prompt, by_spacy):
    service = make("spacy")
    service.warm_up()
    started = time.monotonic()
    while service.spacy_pid is None and time.monotonic() - started < PATIENCE_S:
        time.sleep(0.01)
    assert service.spacy_pid is not None
    assert not service.stats
    service.submit("a", prompt)
    assert service.wait("a", PATIENCE_S).tolist() == by_spacy


@needs_spacy
def test_waiting_ends_with_an_answer(make, prompt, by_table):
    service = make("spacy")
    service.submit("a", prompt)
    assert service.wait("a", 0.0).tolist() == by_table
    assert service.stats == {"spacy_late": 1, "punctuation": 1}


@needs_spacy
def test_dropped_prompts_are_not_read(make, prompt, by_spacy):
    service = make("spacy")
    for n in range(50):
        service.submit(str(n), np.tile(prompt, 100))
        service.drop(str(n))
    service.submit("a", prompt)
    start = time.monotonic()
    assert service.wait("a", PATIENCE_S).tolist() == by_spacy
    assert time.monotonic() - start < PATIENCE_S
    assert service.stats == {"spacy": 1}
