# SPDX-License-Identifier: Apache-2.0
"""Gather of missed head-blocks from the swap pool into the working set."""

from __future__ import annotations

from torch import Tensor

from ..types import LayerPools
from .quantize_pages import dequantize_pages


def swap_in(pools: LayerPools, misses: Tensor) -> None:
    """Copy head-block (page, h) of `host` to head-block (block, h) of `cache`.

    Byte for byte, or from the precision of the pool's format to that of the cache.

    Args:
        misses: [n, 3] int32 rows (page, KV head, block); blocks of one KV head are distinct.
    """
    page, head, block = misses.long().unbind(1)
    source = pools.host[page.to(pools.host.device), head.to(pools.host.device)]
    if pools.host_format:
        source = dequantize_pages(source, pools.host_format, pools.cache.dtype)
        source = source.view(-1, *pools.cache.shape[2:])
    pools.cache[block, head] = source.to(pools.cache.device)
