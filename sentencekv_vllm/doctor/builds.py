# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels: built now, unless they are there, by what a server would call."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from .finding import Finding, State

COMPILER_FIX = "install g++ 12 or later (apt-get install g++), or put it on the PATH"


def builds(cuda: bool) -> list[Finding]:
    """C++, Triton and CUDA kernels, for a machine with a CUDA device or without."""
    return [cpp(cuda), triton(cuda), cuda_kernels(cuda)]


def cpp(cuda: bool) -> Finding:
    name = "C++ kernels"
    if cuda:
        return Finding(name, State.UNUSED, "a server here runs on the CUDA device")
    import torch  # noqa: F401  # its OpenMP runtime is what the library is linked against

    from ..ops.cpu_build import load_library

    found = _built(name, lambda: Path(load_library()._name), State.BROKEN)
    if found.state is State.OK:
        return found
    slow = "decode would run on the PyTorch definitions, which are slow"
    fix = COMPILER_FIX if "g++" in found.found else found.fix
    return Finding(name, found.state, f"{found.found}; {slow}", fix)


def triton(cuda: bool) -> Finding:
    name = "Triton kernels"
    if not cuda:
        return Finding(name, State.UNUSED, "no CUDA device")
    try:
        import triton as module
    except ImportError as error:
        return Finding(name, State.BROKEN, str(error), "pip install triton")
    return Finding(
        name, State.UNKNOWN, f"Triton {module.__version__} compiles them at a server's start"
    )


def cuda_kernels(cuda: bool) -> Finding:
    name = "CUDA kernels"
    if not cuda:
        nvcc = shutil.which("nvcc")
        return Finding(name, State.UNUSED, f"no CUDA device; nvcc: {nvcc or 'not found'}")
    from ..ops.cuda_build import build_cuda

    found = _built(name, build_cuda, State.WARNING)
    if found.state is State.OK:
        return found
    fix = found.fix or "install the CUDA toolkit's nvcc and set CUDA_HOME"
    return Finding(name, found.state, f"{found.found}; Triton's are used instead", fix)


def _built(name: str, build: Callable[[], Path], failed: State) -> Finding:
    from ..ops.native_build import BuildError

    try:
        return Finding(name, State.OK, str(build()))
    except BuildError as error:
        message, _, fix = str(error).partition(": set ")
        return Finding(name, failed, message, f"set {fix}" if fix else "")
    except OSError as error:  # built, but it cannot be loaded
        return Finding(name, failed, str(error), "set SENTENCEKV_CACHE_DIR to another folder")
