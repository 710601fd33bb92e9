# SPDX-License-Identifier: Apache-2.0
"""Copy-out: blocks become host pages with their token index."""

from __future__ import annotations

from torch import Tensor

from ..types import LayerPools
from .pack_keys import pack_keys
from .quantize_pages import quantize_pages


def read_keys(head_blocks: Tensor, key_offset: Tensor, block_size: int) -> Tensor:
    """Keys of head-blocks in token order.

    CPU pages are packed for the instruction set, so keys are found through a table.

    Args:
        head_blocks: [..., N, 2D], as in the cache or the swap pool.
        key_offset: [N * D] int32: element (t, d) of K lies at `key_offset[t * D + d]`
            of the flattened head-block.

    Returns:
        [..., N, D], the dtype of the cache.
    """
    flat = head_blocks.flatten(-2, -1)
    return flat[..., key_offset.long()].unflatten(-1, (block_size, -1))


def index_pages(
    pools: LayerPools, block_ids: Tensor, page_ids: Tensor, key_offset: Tensor, rotation: Tensor
) -> None:
    """Copy blocks to host pages, in the pool's format, and write their sign bits and scales.

    Forgets what the pages' former owner left: residency is cleared. The index is a
    function of the block's keys alone, not of what the host format makes of them, so prefix
    hits, chunks and resumed requests agree.

    Args:
        pools: `host`, `bits`, `scales` and `page_slot` are written.
        block_ids, page_ids: [n] int32, distinct pages.
        key_offset: see `read_keys`.
        rotation: [D, E] float32.
    """
    blocks, pages = block_ids.long(), page_ids.long()
    content = pools.cache[blocks]
    stored = quantize_pages(content, pools.host_format) if pools.host_format else content
    pools.host[pages.to(pools.host.device)] = stored.to(pools.host.device)
    keys = read_keys(content, key_offset, content.shape[-2])
    bits, scales = pack_keys(keys, rotation)
    pools.bits[pages] = bits
    pools.scales[pages] = scales
    pools.page_slot[pages] = -1
