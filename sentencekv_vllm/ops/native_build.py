# SPDX-License-Identifier: Apache-2.0
"""Build `csrc/` on demand into a per-user cache, once per source, command and compiler."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from .build_cache import cache_dirs, locked

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parents[1]


class BuildError(RuntimeError):
    """The library could not be built; the message holds the command and its output."""


def csrc_dir() -> Path:
    """The C++ and CUDA sources: package data of an installed wheel, or those of a checkout."""
    for path in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (path / "include" / "sentencekv").is_dir():
            return path
    raise BuildError(f"no csrc folder in {PACKAGE} or beside it: reinstall sentencekv_vllm")


def build(
    name: str,
    sources: Sequence[Path],
    command_builder: Callable[[Sequence[Path], Path], list[str]],
    include_dirs: Sequence[Path],
    key: str = "",
) -> Path:
    """Compile a shared library unless the cache has it.

    Args:
        name: stem of the library's file name.
        sources: translation units.
        command_builder: (sources, output) -> the whole command line; it names the include
            folders itself and its first word answers `--version`.
        include_dirs: every file below them is part of the cache key.
        key: what else the output depends on, such as the CPU that `-march=native` means.

    Returns:
        Path of the library. Processes that ask at once wait for one build; a library
        appears whole or not at all.

    Raises:
        BuildError: no compiler, no writable cache, or the compiler failed.
    """
    command = command_builder(sources, Path("output"))
    headers = sorted(p for folder in include_dirs for p in folder.rglob("*") if p.is_file())
    digest = hashlib.sha256(
        "\0".join([*command, platform.machine(), key, _run([command[0], "--version"])]).encode()
    )
    for path in (*sources, *headers):
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    file = f"{name}-{digest.hexdigest()[:16]}.so"
    try:
        folders = cache_dirs()
    except OSError as error:
        raise BuildError(
            f"no folder for built kernels can be written ({error}): set SENTENCEKV_CACHE_DIR"
        ) from error
    for folder in folders:
        if (folder / file).exists():
            return folder / file
    library = folders[-1] / file
    with locked(library.with_suffix(".lock")):
        if not library.exists():
            unfinished = library.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
            logger.info("building %s", library)
            try:
                _run(command_builder(sources, unfinished))
                unfinished.replace(library)
            finally:
                unfinished.unlink(missing_ok=True)
    return library


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"cannot run {command[0]}: {error.strerror}") from error
    if done.returncode:
        output = (done.stderr + done.stdout).strip()[-4000:]
        raise BuildError(f"{' '.join(command)} returned {done.returncode}:\n{output}")
    return done.stdout
