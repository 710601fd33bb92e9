# SPDX-License-Identifier: Apache-2.0
"""Compile and load the C++ library of the fused CPU ops."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Sequence
from pathlib import Path

from .native_build import BuildError, build, csrc_dir

FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
)
# Handed to the compiler proper, so that the linker adds no libgomp of its own: torch has loaded
# an OpenMP runtime (vLLM may preload another), and a process should have one.
OPENMP = "-Wp,-fopenmp"


def load_library() -> ctypes.CDLL:
    """The library, built if need be; without OpenMP where the process offers no runtime for it.

    Raises:
        BuildError: it could not be built or loaded.
    """
    try:
        return ctypes.CDLL(str(_build((*FLAGS, OPENMP))))
    except OSError:
        path = _build((*FLAGS, "-fopenmp-simd"))
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(
            f"cannot load {path}: {error}. Set SENTENCEKV_CACHE_DIR to a folder that libraries can "
            "be loaded from"
        ) from error


def _build(flags: Sequence[str]) -> Path:
    folder = csrc_dir() / "cpu"

    def command(sources: Sequence[Path], output: Path) -> list[str]:
        return ["g++", *flags, *map(str, sources), "-o", str(output)]

    return build("cpu", sorted(folder.glob("*.cpp")), command, [folder], key=_cpu_flags())


def _cpu_flags() -> str:
    """What `-march=native` depends on: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))
