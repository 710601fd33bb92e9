# SPDX-License-Identifier: Apache-2.0
"""What vLLM knows of us in a process: `python -P -m ...presence FILE` writes it as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import vllm
from vllm import envs
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum

BACKEND, CONNECTOR = "SENTENCEKV", "SentenceKVConnector"


def presence() -> dict[str, Any]:
    """After vLLM has loaded its plugins as it does in every process. Ours is not imported before
    that: the answer would be yes whatever vLLM does."""
    load_general_plugins()
    return {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "backend": BACKEND in AttentionBackendEnum.__members__,
        "connector": CONNECTOR in KVConnectorFactory._registry,
        "plugins": envs.VLLM_PLUGINS,
        "version": vllm.__version__,
        "refusal": _refusal(),
        "cuda": current_platform.is_cuda(),
    }


def _refusal() -> str | None:
    """Why this version of vLLM is refused, in the words of the refusal."""
    from . import setup

    try:
        setup._refuse_version(allowed=False)
    except ValueError as error:
        return str(error)
    return None


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(presence()))
