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

MAX_CRASHES = 3  # at its start, without an answer in between: then every job fails at once
_STOP_TIMEOUT_S = 5.0
# Wall time after which a process hangs; it runs at low priority beside a busy engine.
_START_S, _BASE_S, _TOKEN_S = 120.0, 60.0, 500e-6


class SpacyJob:
    """One prompt on its way through the process; `done` is set when it has left."""

    def __init__(self, token_ids: TokenIds) -> None:
        self.token_ids = token_ids
        self.ends: Ends | None = None  # None once done: spaCy failed
        self.cancelled = False
        self.urgent = False  # answered before those that are not
        self.done = threading.Event()


class SpacyProcess:
    """Starts at the first job; answers jobs in order, urgent ones first.

    The prompt that it crashes or hangs on fails, and it is started again for the next one. It is
    given up only where it does not come up at all, which is no prompt's doing.

    A thread of the parent, asleep but for the copies, carries the prompts and answers: a prompt
    of 128K tokens is more than a pipe holds, and the caller must not wait for it to be read.
    """

    def __init__(self, lengths: SentenceLengths, vocabulary: Vocabulary) -> None:
        self._lengths = lengths
        self._vocabulary = vocabulary
        self._arrivals: SimpleQueue[SpacyJob | None] = SimpleQueue()
        self._lock = threading.Lock()  # held to start or stop the process
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._courier: threading.Thread | None = None
        self._closed = False
        self._crashes = 0

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process else None

    def submit(self, token_ids: TokenIds) -> SpacyJob:
        """Queue a prompt: [n] int32, not to be changed before the job is done."""
        job = SpacyJob(token_ids)
        if self._closed:
            job.done.set()
            return job
        self._arrivals.put(job)
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
        self._arrivals.put(None)
        if self._courier:
            self._courier.join(_STOP_TIMEOUT_S)
        self._stop()

    def _carry(self) -> None:
        waiting: list[SpacyJob] = []
        while True:
            while not waiting or not self._arrivals.empty():
                arrived = self._arrivals.get()
                if arrived is None:
                    for job in waiting:
                        job.done.set()
                    return
                waiting.append(arrived)
            job = next((job for job in waiting if job.urgent), waiting[0])
            waiting.remove(job)
            if not job.cancelled:
                job.ends = self._answer(job.token_ids)
            job.done.set()

    def _answer(self, token_ids: TokenIds) -> Ends | None:
        """A prompt's sentences; None: spaCy raised, died or hung."""
        if self._crashes >= MAX_CRASHES:
            return None
        try:
            if self._connection is None:
                self._start()
                self._ask(np.empty(0, np.int32), _START_S)
                self._crashes = 0
        except (OSError, EOFError):
            self._crashes += 1
            self._stop()
            return None
        try:
            return self._ask(token_ids, _BASE_S + _TOKEN_S * len(token_ids))
        except (OSError, EOFError):
            self._stop()
            return None

    def _ask(self, token_ids: TokenIds, timeout_s: float) -> Ends | None:
        assert self._connection is not None
        self._connection.send_bytes(np.ascontiguousarray(token_ids, np.int32).data)
        if not self._connection.poll(timeout_s):
            raise EOFError("it hangs")
        answer = self._connection.recv_bytes()
        # No bytes: spaCy raised or gave the prompt up; the process goes on.
        return np.frombuffer(answer, np.int32, offset=8) if answer else None

    def _start(self) -> None:
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

    def _stop(self) -> None:
        with self._lock:
            if self._connection:
                self._connection.close()
            if self._process:
                self._process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_STOP_TIMEOUT_S)
            self._connection = self._process = None
