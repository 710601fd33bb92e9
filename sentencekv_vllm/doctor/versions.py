# SPDX-License-Identifier: Apache-2.0
"""Versions of what is installed, from its metadata: nothing is imported."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, version

from .. import __version__
from .finding import Finding, State

OLDEST_PYTHON = (3, 11)
INSTALL = "pip install 'sentencekv-vllm[cuda]', or '[cpu]'"


def versions() -> list[Finding]:
    """Python's, ours, and those of the packages that serving needs."""
    return [
        _python(),
        Finding("sentencekv-vllm", State.OK, __version__),
        _package("torch", INSTALL),
        _vllm(),
        _package("triton", "pip install triton; vLLM's V2 runner and our GPU kernels need it",
                 State.WARNING),
        _package("spacy", "pip install 'spacy>=3.8,<4', or keep segmenter at auto, punctuation "
                 "or fixed", State.WARNING),
    ]  # fmt: skip


def _python() -> Finding:
    found = platform.python_version()
    if sys.version_info >= OLDEST_PYTHON:
        return Finding("python", State.OK, found)
    oldest = ".".join(map(str, OLDEST_PYTHON))
    return Finding("python", State.BROKEN, found, f"install Python {oldest} or newer")


def _package(name: str, fix: str, missing: State = State.BROKEN) -> Finding:
    try:
        return Finding(name, State.OK, version(name))
    except PackageNotFoundError:
        return Finding(name, missing, "not installed", fix)


def _vllm() -> Finding:
    """Whatever the distribution is called that brings the module; vLLM asks for its own name."""
    bringing = sorted(set(packages_distributions().get("vllm", ())))
    try:
        found = version("vllm")
    except PackageNotFoundError:
        if not bringing:
            return Finding("vllm", State.BROKEN, "not installed", INSTALL)
        return Finding(
            "vllm",
            State.BROKEN,
            f"the module comes from {', '.join(bringing)}, and vLLM does not find its own version",
            "python -m sentencekv_vllm.install_cpu",
        )
    others = [f"{name} {version(name)}" for name in bringing if name != "vllm"]
    beside = f" ({', '.join(others)})" if others else ""
    return Finding("vllm", State.OK, found + beside)
