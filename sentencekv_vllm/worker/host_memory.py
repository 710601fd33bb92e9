# SPDX-License-Identifier: Apache-2.0
"""Host memory of the swap pool, page-locked for a GPU."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError

GIB = 2**30
MEMINFO = Path("/proc/meminfo")
OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
CGROUP_FILES = (  # limit, usage, and the name of the unused part of the file cache
    ("memory.max", "memory.current", "inactive_file"),  # version 2
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_bytes() -> int | None:
    """Host memory that can be had without swapping: of the machine, and of each control group
    that this process is in. None where the system does not tell."""
    known = [n for n in (machine_bytes(), cgroup_bytes()) if n is not None]
    return min(known, default=None)


def machine_bytes(meminfo: Path = MEMINFO) -> int | None:
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def cgroup_bytes(own: Path = OWN_CGROUPS, root: Path = CGROUPS) -> int | None:
    """The smallest limit minus usage of the groups around this process; None without a limit.

    A container may show its own group as the root of the tree, so that groups that are named
    but not there are left out. Cached files that are not in use count as free, as they do in
    MemAvailable: the weights have just been read through that cache.

    Args:
        own: lines `hierarchy:controllers:path`; version 2 has no controllers.
        root: where the trees are mounted; version 1 has its memory tree in `memory`.
    """
    if not own.exists():
        return None
    free = []
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        tree = root / "memory" if controllers else root
        group = tree / path.lstrip("/")
        for folder in (group, *group.parents):
            free += [n for names in CGROUP_FILES if (n := _group_bytes(folder, *names)) is not None]
            if folder == tree:
                break
    return min(free, default=None)


def _group_bytes(folder: Path, limit: str, usage: str, cached: str) -> int | None:
    if not ((folder / limit).exists() and (folder / usage).exists()):
        return None
    text = (folder / limit).read_text().strip()
    if text == "max":
        return None
    stat = folder / "memory.stat"
    counts = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    used = int((folder / usage).read_text()) - int(counts.get(cached, 0))
    return max(0, int(text) - used)


def check_fits(what: str, needed: int, available: int | None, fix: str) -> None:
    """Refuse before the allocation does, in words.

    Raises:
        ConfigError: `needed` bytes are more than there are.
    """
    if available is not None and needed > available:
        raise ConfigError(
            f"{what} takes {needed / GIB:.2f} GiB, {available / GIB:.2f} GiB are free: {fix}"
        )


class HostPool:
    """The swap pool's memory. On a GPU it is pinned at its exact size.

    torch's own `pin_memory` rounds up to a power of two; registering memory does not.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> None:
        if pinned:  # taken at once; otherwise as it is filled
            check_fits(
                "the swap pool of this worker",
                prod(shape) * dtype.itemsize,
                available_bytes(),
                "lower host_pool_gib, of which every tensor-parallel worker takes its own",
            )
        self.tensor: Tensor = torch.empty(shape, dtype=dtype)
        self._pinned = False
        if not pinned or not self.tensor.nbytes:
            return
        status = _cudart().cudaHostRegister(self.tensor.data_ptr(), self.tensor.nbytes, 0)
        if int(status) != 0:
            raise ConfigError(
                f"the driver refused to pin {self.tensor.nbytes / GIB:.2f} GiB for the swap pool "
                f"(CUDA error {int(status)}): lower host_pool_gib, or raise the container's "
                "limits on memory and on locked memory (ulimit -l)"
            )
        self._pinned = True

    def close(self) -> None:
        """Unpin; work that was queued on the pool must be done."""
        if self._pinned:
            _cudart().cudaHostUnregister(self.tensor.data_ptr())
            self._pinned = False


def _cudart() -> Any:
    return torch.cuda.cudart()
