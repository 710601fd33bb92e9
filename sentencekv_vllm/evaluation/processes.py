# SPDX-License-Identifier: Apache-2.0
"""Several engines, each in a process of its own, that share the questions of a run.

A small model on a CPU gains nothing from more threads, but the questions are independent.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import Empty
from typing import Any

from .records import Record

Send = Callable[[Record], None]
Work = Callable[[int, Send], None]
"""Answers the share of a process, told its number, and sends records as they are ready; has to be
picklable."""


class ProcessError(RuntimeError):
    """A process ended before its share was done; the message says what it said."""


def shared(work: Work, num_processes: int) -> Iterator[Record]:
    """The records of all processes as they come.

    Raises:
        ProcessError: one of them failed; the others are ended.
    """
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    processes = [
        spawn.Process(target=_run, args=(work, number, queue), daemon=True)
        for number in range(num_processes)
    ]
    for process in processes:
        process.start()
    try:
        yield from _received(queue, processes)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _received(queue: Any, processes: Sequence[Any]) -> Iterator[Record]:
    running = len(processes)
    while running:
        try:
            message = queue.get(timeout=1)
        except Empty:
            dead = [p.exitcode for p in processes if p.exitcode]
            if dead:
                raise ProcessError(f"an engine's process ended with status {dead[0]}") from None
            continue
        if isinstance(message, Record):
            yield message
        elif message is None:
            running -= 1
        else:
            raise ProcessError(message)


def _end_with_parent() -> None:
    """A run that was killed leaves no engines behind, which daemons alone would be."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(work: Work, number: int, queue: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(number, queue.put)
        queue.put(None)
    except Exception as error:
        queue.put(f"an engine's process failed: {type(error).__name__}: {error}")
        raise
