# SPDX-License-Identifier: Apache-2.0
"""Where built libraries are kept: a folder of this user's that can be written, whatever the home
folder is. What is loaded from there runs, so nobody else may have put it there."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

VARIABLE = "SENTENCEKV_CACHE_DIR"
DEFAULT = "~/.cache/sentencekv_vllm"


def cache_dirs() -> list[Path]:
    """Where a library may lie, best first; the last one can be written.

    `$SENTENCEKV_CACHE_DIR`, by default `~/.cache/sentencekv_vllm`, made if missing. If it cannot
    be written, it may still hold what was built when it could, and a folder for temporary files
    follows, which the log names with the reason.

    Raises:
        OSError: not even a temporary folder can be written.
    """
    return list(_cache_dirs(os.environ.get(VARIABLE) or "", os.environ.get("HOME") or ""))


@cache  # said once a process
def _cache_dirs(chosen: str, home: str) -> tuple[Path, ...]:
    wanted = chosen or DEFAULT
    try:
        path = Path(wanted).expanduser()
    except RuntimeError as error:  # there is no home folder
        return (_said(wanted, error),)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _try(path)
    except OSError as error:
        return path, _said(wanted, error)
    return (path,)


def _said(wanted: str, error: Exception) -> Path:
    fallback = _temporary()
    logger.warning(
        "SentenceKV: built kernels cannot be kept in %s (%s): what is not there yet goes to %s. "
        "Set %s to a folder that this user can write to and load libraries from.",
        wanted,
        error,
        fallback,
        VARIABLE,
    )
    return fallback


def _temporary() -> Path:
    """One folder for all processes of a user, or, where its name is taken by somebody else's, one
    for this process."""
    path = Path(tempfile.gettempdir()) / f"sentencekv_vllm-{os.getuid()}"
    with suppress(OSError):
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()  # not through a link that another user has put there
        if status.st_uid == os.getuid() and status.st_mode & 0o077 == 0 and not path.is_symlink():
            _try(path)
            return path
    return Path(tempfile.mkdtemp(prefix="sentencekv_vllm-"))


def _try(folder: Path) -> None:
    """Raise OSError now; permissions alone do not tell (read-only mounts, /proc, full disks)."""
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise OSError("it is mounted noexec, no library can be loaded from it")
    handle, name = tempfile.mkstemp(dir=folder)
    try:
        os.write(handle, b"\0")
    finally:
        os.close(handle)
        os.unlink(name)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file; where the file system has no locks, go on without: a library appears
    whole by its rename, so that two processes at worst build it twice."""
    with open(path, "w") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
