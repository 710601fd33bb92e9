# SPDX-License-Identifier: Apache-2.0
"""The program of the spaCy process: prompts in, sentence ends out, over one connection."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection

import numpy as np

from .lengths import SentenceLengths
from .spacy import SpacySegmenter
from .vocabulary import Vocabulary


def main() -> None:
    """Answer prompts until the parent is gone."""
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    os.nice(10)  # the engine's threads go first
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    connection = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError, OSError):
        _serve(connection)


def _leave_with(parent: int) -> None:
    # The end of the pipe says so too, but not in the middle of a prompt.
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def _serve(connection: Connection) -> None:
    minimum, maximum = np.frombuffer(connection.recv_bytes(), np.int64).tolist()
    offsets = np.frombuffer(connection.recv_bytes(), np.int64)
    blob = np.frombuffer(connection.recv_bytes(), np.uint8)
    segmenter = SpacySegmenter(SentenceLengths(minimum, maximum), Vocabulary(blob, offsets))
    while True:
        token_ids = np.frombuffer(connection.recv_bytes(), np.int32)
        start = time.process_time()
        try:
            ends = segmenter.split(token_ids)
        except Exception as error:  # whatever one prompt did to spaCy, the next may pass
            print(f"spaCy failed on a prompt of {len(token_ids)} tokens: {error}", file=sys.stderr)
            connection.send_bytes(b"")
        else:
            seconds = np.float64(time.process_time() - start)
            connection.send_bytes(seconds.tobytes() + ends.tobytes())


if __name__ == "__main__":
    main()
