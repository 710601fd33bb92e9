# SPDX-License-Identifier: Apache-2.0
"""Where keys and values lie inside a head-block."""

from __future__ import annotations

import torch
from vllm import _custom_ops as ops

from ..ops.token_layout import TokenLayout


def cpu_token_layout(block_size: int, head_dim: int, dtype: torch.dtype, isa: str) -> TokenLayout:
    """The head-blocks of the CPU backend, which packs them for its ISA.

    The layout is nowhere documented, so it is probed: distinct numbers, small enough to be
    exact in every dtype, are written through vLLM's own cache op and found again.

    Raises:
        RuntimeError: the packing is no permutation of the elements.
    """
    numel, base = block_size * head_dim, 128
    found = torch.zeros(2, numel, dtype=torch.int64)
    slots = torch.arange(block_size, dtype=torch.int64)
    weight = 1
    while weight < numel:  # one base-128 digit of the element's number at a time
        digit = (torch.arange(numel) // weight % base).view(block_size, 1, head_dim).to(dtype)
        cache = torch.zeros(1, 1, 2 * block_size, head_dim, dtype=dtype)
        key_cache, value_cache = cache.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(digit, digit, key_cache, value_cache, slots, isa)
        found += cache.reshape(2, -1).long() * weight
        weight *= base
    if not torch.equal(found.sort().values, torch.arange(numel).expand(2, -1)):
        raise RuntimeError(
            f"the CPU backend's packing (isa {isa!r}, block {block_size}, head {head_dim}, "
            f"{dtype}) is no permutation: this vLLM build is not supported"
        )
    keys, values = (half.argsort().view(block_size, head_dim) for half in found)
    return TokenLayout(keys, values + numel)
