# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of `csrc/*.cu` as a shared library with a C ABI."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from .native_build import BuildError, build, csrc_dir

ARCHITECTURES = (80, 90)  # Ampere, Hopper; later GPUs compile the PTX of the last one


def find_nvcc() -> str:
    """nvcc from CUDA_HOME, the PATH or the usual place.

    Raises:
        BuildError: there is none.
    """
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else []
    for candidate in [*candidates, "nvcc", "/usr/local/cuda/bin/nvcc"]:
        if found := shutil.which(candidate):
            return found
    raise BuildError("no nvcc in $CUDA_HOME/bin, the PATH or /usr/local/cuda/bin: set CUDA_HOME")


def nvcc_command(sources: Sequence[Path], output: Path) -> list[str]:
    """The whole command line; the CUDA runtime is linked in, so nothing is needed beside it."""
    newest = ARCHITECTURES[-1]
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    targets.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return [
        *(find_nvcc(), "-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC", "-cudart=static"),
        "--threads=0",  # as many as there are cores
        *(f"-I{csrc_dir() / 'include'}", *targets, *map(str, sources), "-o", str(output)),
    ]


def cuda_sources() -> list[Path]:
    return sorted(csrc_dir().glob("*.cu"))


def build_cuda() -> Path:
    """Compile the kernels unless the cache has them (half a minute on two cores).

    Raises:
        BuildError: no nvcc, no sources, or the compiler failed.
    """
    return build("sentencekv_cuda", cuda_sources(), nvcc_command, [csrc_dir() / "include"])
