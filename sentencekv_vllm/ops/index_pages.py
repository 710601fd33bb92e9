# SPDX-License-Identifier: Apache-2.0
"""Copy-out: blocks become host pages with their codes."""

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


def index_pages(pools: LayerPools, block_ids: Tensor, page_ids: Tensor, key_offset: Tensor) -> None:
    """Copy blocks to host pages, in the pool's format, and write their codes.

    Forgets what the pages' former owner left: residency and `page_kept` are cleared. The index is a
    function of the block's keys alone, not of what the host format makes of them, so prefix
    hits, chunks and resumed requests agree.

    Args:
        pools: `host` and `page_slot` are written and, where the server keeps codes, what
            `pack_keys` makes of the blocks' keys.
        block_ids, page_ids: [n] int32, distinct pages.
        key_offset: see `read_keys`.
    """
    blocks, pages = block_ids.long(), page_ids.long()
    content = pools.cache[blocks]
    stored = quantize_pages(content, pools.host_format) if pools.host_format else content
    pools.host[pages.to(pools.host.device)] = stored.to(pools.host.device)
    pools.page_slot[pages] = -1
    if pools.codes is None:
        return
    assert pools.basis is not None and pools.page_kept is not None
    assert pools.scales is not None and pools.means is not None and pools.mean_scales is not None
    keys = read_keys(content, key_offset, content.shape[-2])
    packed = pack_keys(keys, pools.basis, 8 * pools.codes.shape[2])
    pools.codes[pages] = packed.codes
    pools.scales[pages] = packed.scales
    pools.means[pages] = packed.means
    pools.mean_scales[pages] = packed.mean_scales
    pools.page_kept[pages] = 0
