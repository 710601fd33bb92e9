# SPDX-License-Identifier: Apache-2.0
"""Segmenting a 128K-token prompt does not hold up an engine that steps every millisecond."""

from __future__ import annotations

import importlib.util
import time

import numpy as np
import pytest

from sentencekv_vllm.segmentation import SegmentationService

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(importlib.util.find_spec("spacy") is None, reason="spaCy is not installed"),
]

STEP_S = 1.5e-3
STALL_S = 5e-3


def one_step():
    """Python and numpy work that takes 1.5 ms of this thread's time, as a scheduler's does."""
    until = time.thread_time() + STEP_S
    values = np.arange(1000)
    while time.thread_time() < until:
        values = values + 1


class Clock:
    """Wall time and time of this thread spent in the calls it made, in seconds."""

    def __init__(self):
        self.wall, self.thread = [], []

    def __call__(self, call, *arguments):
        wall, thread = time.perf_counter(), time.thread_time()
        result = call(*arguments)
        self.thread.append(time.thread_time() - thread)
        self.wall.append(time.perf_counter() - wall)
        return result


@pytest.fixture(scope="module")
def service(byte_coded):
    service = SegmentationService(
        "spacy",
        byte_coded.vocabulary,
        min_sentence_tokens=4,
        max_sentence_tokens=64,
        fixed_length=16,
    )
    yield service
    service.close()


@pytest.mark.parametrize(("state", "num_tokens"), [("cold", 8192), ("warm", 131_072)])
def test_spacy_does_not_stall_the_engine(service, byte_coded, state, num_tokens):
    """Cold, the process starts meanwhile; warm, it is there from the test before."""
    prompt = byte_coded.encode("One sentence of words. Another one here! A third?\n")
    alone, during, calls = Clock(), Clock(), Clock()
    for _ in range(300):
        alone(one_step)

    def step():
        one_step()
        return calls(service.poll, state)

    prompt = np.resize(prompt, num_tokens)
    process, thread = time.process_time(), time.thread_time()
    calls(service.submit, state, prompt)
    ends = None
    while ends is None:
        ends = during(step)
    # What the engine's process spent beside its engine thread: carrying prompt and answer.
    beside = time.process_time() - process - (time.thread_time() - thread)

    assert ends[-1] == num_tokens
    assert service.stats["spacy_failed"] == 0
    assert len(during.wall) > 50, "too few steps to tell"
    # Times of threads are free of what else the machine does: all that the service does to a
    # step is its own calls, and the interpreter lock that carrying may hold.
    # The first call starts the process: a mistake is tens of milliseconds, not a slow fork.
    assert max(calls.thread[1:]) < STALL_S / 2
    assert calls.thread[0] < 4 * STALL_S
    assert beside < STALL_S
    # Wall time has the machine's noise in it, of which the steps alone have as much.
    assert np.quantile(calls.wall, 0.99) < STALL_S
    assert np.median(during.wall) - np.median(alone.wall) < STALL_S
