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


def available_bytes(meminfo: Path = MEMINFO) -> int | None:
    """Host memory that can be had without swapping; None where the system does not tell."""
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


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
