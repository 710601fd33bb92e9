# SPDX-License-Identifier: Apache-2.0
"""Where the keys lie inside a head-block."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm import _custom_ops as ops


def cpu_key_offset(block_size: int, head_dim: int, dtype: torch.dtype, isa: str) -> Tensor:
    """Offsets of the keys in a head-block of the CPU backend, which packs K for its ISA.

    The layout is nowhere documented, so it is probed: distinct numbers, small enough to be
    exact in every dtype, are written through vLLM's own cache op and found again.

    Returns:
        [N * D] int32: element (t, d) of K lies at `offset[t * D + d]` of the flattened
        head-block [N * 2D].

    Raises:
        RuntimeError: the packing is no permutation of the elements.
    """
    numel, base = block_size * head_dim, 128
    found = torch.zeros(numel, dtype=torch.int64)
    slots = torch.arange(block_size, dtype=torch.int64)
    weight = 1
    while weight < numel:  # one base-128 digit of the element's number at a time
        digit = (torch.arange(numel) // weight % base).view(block_size, 1, head_dim).to(dtype)
        cache = torch.zeros(1, 1, 2 * block_size, head_dim, dtype=dtype)
        key_cache, value_cache = cache.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(digit, digit, key_cache, value_cache, slots, isa)
        found += key_cache.reshape(-1).long() * weight
        weight *= base
    if not torch.equal(found.sort().values, torch.arange(numel)):
        raise RuntimeError(
            f"the CPU backend's key packing (isa {isa!r}, block {block_size}, head {head_dim}, "
            f"{dtype}) is no permutation: this vLLM build is not supported"
        )
    return found.argsort().to(torch.int32)
