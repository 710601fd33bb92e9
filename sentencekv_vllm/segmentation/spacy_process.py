# SPDX-License-Identifier: Apache-2.0
"""The engine's end of the spaCy process, which keeps spaCy off the engine's interpreter lock."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from multiprocessing.connection import Connection, Pipe
from queue import SimpleQueue

import numpy as np

from .base import TokenIds
from .lengths import Ends, SentenceLengths
from .vocabulary import Vocabulary

MAX_CRASHES = 3  # after which every job fails at once
_STOP_TIMEOUT_S = 5.0


class SpacyJob:
    """One prompt on its way through the process; `done` is set when it has left."""

    def __init__(self, token_ids: TokenIds) -> None:
        self.token_ids = token_ids
        self.ends: Ends | None = None  # None once done: spaCy failed
        self.cancelled = False
        self.done = threading.Event()


class SpacyProcess:
    """Starts at the first job; answers jobs in order; is started again after a crash, twice.

    A thread of the parent, asleep but for the copies, carries the prompts and answers: a prompt
    of 128K tokens is more than a pipe holds, and the caller must not wait for it to be read.
    """

    def __init__(self, lengths: SentenceLengths, vocabulary: Vocabulary) -> None:
        self._lengths = lengths
        self._vocabulary = vocabulary
        self._jobs: SimpleQueue[SpacyJob | None] = SimpleQueue()
        self._lock = threading.Lock()  # held to start or stop the process
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._courier: threading.Thread | None = None
        self._closed = False
        self._crashes = 0
        # Decayed sums behind the running rate; the first guess weighs as much as 20K tokens.
        self._rate_tokens, self._rate_seconds = 20_000.0, 20_000 * 6e-6
        self._tokens_in = 0
        self._tokens_out = 0

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process else None

    def expected_seconds(self, num_tokens: int) -> float:
        """Return how long a prompt of this many tokens would take behind those waiting."""
        waiting = self._tokens_in - self._tokens_out
        return (waiting + num_tokens) * self._rate_seconds / self._rate_tokens

    def submit(self, token_ids: TokenIds) -> SpacyJob:
        """Queue a prompt: [n] int32, not to be changed before the job is done."""
        job = SpacyJob(token_ids)
        if self._closed:
            job.done.set()
            return job
        self._tokens_in += len(token_ids)
        self._jobs.put(job)
        if self._courier is None:
            self._courier = threading.Thread(target=self._carry, name="spacy", daemon=True)
            self._courier.start()
        return job

    def close(self) -> None:
        """Kill the process and fail the jobs that are left."""
        with self._lock:
            self._closed = True
            if self._process:
                self._process.kill()
        self._jobs.put(None)
        if self._courier:
            self._courier.join(_STOP_TIMEOUT_S)
        self._stop()

    def _carry(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not job.cancelled and self._crashes < MAX_CRASHES:
                try:
                    self._answer(job)
                except (OSError, EOFError):
                    self._crashes += 1
                    self._stop()
            self._tokens_out += len(job.token_ids)
            job.done.set()

    def _answer(self, job: SpacyJob) -> None:
        connection = self._connection or self._start()
        connection.send_bytes(np.ascontiguousarray(job.token_ids, np.int32).data)
        answer = connection.recv_bytes()
        if not answer:  # spaCy raised; the process goes on
            return
        seconds = float(np.frombuffer(answer, np.float64, 1)[0])
        self._rate_tokens = 0.8 * self._rate_tokens + len(job.token_ids)
        self._rate_seconds = 0.8 * self._rate_seconds + seconds
        job.ends = np.frombuffer(answer, np.int32, offset=8)

    def _start(self) -> Connection:
        with self._lock:
            if self._closed:
                raise EOFError
            ours, theirs = Pipe()
            # A fresh interpreter, as the engine's may be a daemon, which may not use
            # `multiprocessing`, and may hold a GPU, which does not survive a fork.
            command = [
                sys.executable,
                "-P",
                "-m",
                f"{__package__}.spacy_worker",
                str(theirs.fileno()),
            ]
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "OMP_NUM_THREADS": "1",
            }
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
            theirs.close()
            self._connection = ours
        bounds = np.array([self._lengths.min_tokens, self._lengths.max_tokens])
        for array in (bounds, self._vocabulary.offsets, self._vocabulary.blob):
            ours.send_bytes(array.data)
        return ours

    def _stop(self) -> None:
        with self._lock:
            if self._connection:
                self._connection.close()
            if self._process:
                self._process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_STOP_TIMEOUT_S)
            self._connection = self._process = None
