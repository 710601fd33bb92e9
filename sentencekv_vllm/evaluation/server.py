# SPDX-License-Identifier: Apache-2.0
"""A `vllm serve` of our own, for a demo or a benchmark: started, awaited, always stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from .prometheus import Metrics

# One thread per engine: several servers share few cores, and vLLM would bind all to the same.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
STOP_SECONDS = 15
# As a module: there may be no console script `vllm` beside this Python, or another one's.
VLLM_SERVE = (sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve")


class ServerError(RuntimeError):
    """The server stopped or did not get ready; the message ends with the tail of its log."""


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """Context manager: entering starts the process, leaving stops it and its children.

    Several servers start at the same time if all are entered before one is awaited.
    """

    def __init__(
        self, model: Path, arguments: Sequence[str], log: Path, command: Sequence[str] = ()
    ) -> None:
        """Prepare.

        Args:
            model: folder or name of the model; it is served as its last part.
            arguments: of `vllm serve`.
            log: file for everything that the server prints.
            command: in place of this Python's `vllm serve`.
        """
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.model = model.name
        self._log = log
        self._command = [
            *(command or VLLM_SERVE),
            *(str(model), "--served-model-name", self.model),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *arguments,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | ENVIRONMENT,
                start_new_session=True,  # a group of its own, so that the whole group can be ended
            )
        return self

    def __exit__(self, *exception: object) -> None:
        process = self._process
        assert process is not None, "entered before it is left"
        self._signal_group(signal.SIGTERM)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        finally:
            self._signal_group(signal.SIGKILL)  # children that outlived it
            process.wait()

    def wait_ready(self, timeout_s: float) -> None:
        """Return when `/health` answers.

        Raises:
            ServerError: the process has ended, or the time is over.
        """
        assert self._process is not None, "entered before it is awaited"
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerError(
                    f"the server ended with status {self._process.returncode} before it was "
                    f"ready. The end of its log:\n{self.log_tail()}"
                )
            if self._healthy():
                return
            time.sleep(0.25)
        raise ServerError(
            f"the server was not ready after {timeout_s:.0f} s. The end of its log:\n"
            f"{self.log_tail()}"
        )

    @property
    def pid(self) -> int:
        """Of the process that was started, which leads the session of all its children."""
        assert self._process is not None, "entered before it is asked"
        return self._process.pid

    def metrics(self) -> Metrics:
        """What `/metrics` says now."""
        return Metrics(self.metrics_text())

    def metrics_text(self) -> str:
        """The same, as it came."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as reply:
            return str(reply.read().decode())

    def log_tail(self, lines: int = 40) -> str:
        """The last lines that the server printed."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _signal_group(self, number: signal.Signals) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
