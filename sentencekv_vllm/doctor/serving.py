# SPDX-License-Identifier: Apache-2.0
"""What vLLM knows of us, and whether an engine answers as one with plain attention does.

vLLM is looked at from processes of their own: a broken one must not end the report.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .finding import Finding, State

GLUE = "sentencekv_vllm.vllm_glue"
PRESENCE, SELF_TEST = f"{GLUE}.presence", f"{GLUE}.self_test"
TIMEOUT_S = 600  # of a start; the first one on a machine may compile
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "INFO",  # the lines at start are part of what is told
    "OMP_NUM_THREADS": "1",  # equal work then gives equal bits
    "VLLM_CPU_ATTN_SPLIT_KV": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # a function of ours is sent to our own worker
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class ProbeError(RuntimeError):
    """A process ended without an answer; the message is the last line that it printed."""


def probe(module: str) -> dict[str, Any]:
    """What `python -m module FILE` wrote to the file as JSON, and its `log`.

    Raises:
        ProbeError: it wrote nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        command = [sys.executable, "-P", "-m", module, str(answer)]
        inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        try:
            done = subprocess.run(
                command,
                env=inherited | ENVIRONMENT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as error:
            raise ProbeError(f"no answer after {TIMEOUT_S} s") from error
        if not answer.exists():
            lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
            raise ProbeError(lines[-1] if lines else f"ended with status {done.returncode}")
        return {**json.loads(answer.read_text()), "log": done.stdout}


def registered(where: str, facts: dict[str, Any], note: str = "") -> Finding:
    """Backend and connector in one process, from `presence.presence()`."""
    name = f"backend in the {where} process"
    if facts["backend"] and facts["connector"]:
        return Finding(name, State.OK, f"registered{note}")
    if facts["plugins"] is not None and "sentencekv" not in facts["plugins"]:
        fix = "add sentencekv to VLLM_PLUGINS, or unset it"
        return Finding(name, State.BROKEN, f"VLLM_PLUGINS is {','.join(facts['plugins'])}", fix)
    fix = "pip install sentencekv-vllm into the environment of vLLM"
    return Finding(name, State.BROKEN, "vLLM has loaded no plugin of ours", fix)


def supported(facts: dict[str, Any]) -> Finding:
    """Whether this vLLM is one that we are made for."""
    if facts["refusal"] is None:
        return Finding("vLLM is a tested one", State.OK, facts["version"])
    message, _, fix = facts["refusal"].partition(": ")
    return Finding("vLLM is a tested one", State.BROKEN, message, fix)


def api_process() -> dict[str, Any]:
    """What a process that loads vLLM's plugins knows.

    Raises:
        ProbeError: vLLM cannot be imported.
    """
    return probe(PRESENCE)


def importable(error: ProbeError) -> Finding:
    fix = "run `python -c 'import vllm'` and mend what it says"
    return Finding("vLLM can be imported", State.BROKEN, str(error), fix)
