# SPDX-License-Identifier: Apache-2.0
"""Host pages of one layer come back to the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

StagePages = Callable[[Tensor, Tensor, Tensor], None]


def stage_pages(host: Tensor, cache: Tensor, pairs: Tensor) -> None:
    """Copy pages into blocks, byte by byte.

    Args:
        host: [P, H, N, 2D], a layer of the swap pool.
        cache: [B, H, N, 2D], written; of the same type.
        pairs: [n, 2] int32 on the CPU: page and block; no block twice.
    """
    pages, blocks = pairs.long().unbind(1)
    if cache.device == host.device:
        cache.index_copy_(0, blocks, host.index_select(0, pages))
    else:
        cache[blocks.to(cache.device)] = host[pages].to(cache.device)


def page_stager(device: torch.device) -> StagePages:
    """`stage_pages` as a device does it fastest: a GPU through its copy engines, on the current
    stream."""
    if device.type != "cuda":
        return stage_pages
    from .cuda import Launcher, library

    kernels = library()
    if kernels is None:
        return stage_pages
    launcher = Launcher(kernels)

    def staged(host: Tensor, cache: Tensor, pairs: Tensor) -> None:
        launcher.copy_page_runs(host, cache, pairs)

    return staged
