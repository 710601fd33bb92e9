# SPDX-License-Identifier: Apache-2.0
"""Head-blocks at lower precision for the swap pool, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..host_format import RUN, HostDtype, HostFormat

SMALLEST = 2.0**-100
"""A group that spans less is stored as one number: the inverse of its step could overflow."""


def quantize_pages(content: Tensor, fmt: HostFormat) -> Tensor:
    """Store head-blocks in a format.

    With `low` and `high` the extremes of a group, all in float32:
      integers: step = (high - low) / levels, rounded up to bfloat16; code = (x - low) / step to
        the nearest, ties to even. The error is at most half a step, a constant group is exact;
      fp8: step = 2^(e - 7), where 2^e is the binade of max |x|; code = e4m3(x / step), to the
        nearest, ties to even. The step is a power of two as in the OCP microscaling formats,
        one binade lower than there, so that nothing saturates.
    A step is a bfloat16 and a code has 8 bits, so code times step is exact in float32 and
    whether an implementation fuses the multiplication with the addition does not matter.

    Args:
        content: [..., N, 2D], finite; what comes back may exceed it by half a step, so float16
            should stay that far below its largest number.

    Returns:
        [..., head_block_bytes] uint8.
    """
    groups = content.flatten(-2).unflatten(-1, (fmt.num_groups, fmt.group_size)).float()
    if fmt.dtype is HostDtype.FP8:
        largest = groups.abs().amax(-1)
        step = _power_of_two(largest)
        codes = (groups * _inverse(step)[..., None]).to(torch.float8_e4m3fn).view(torch.uint8)
        parts = [codes.flatten(-2), _bytes(step.to(torch.bfloat16))]
        return torch.cat(parts, -1)
    low, high = groups.amin(-1) + 0.0, groups.amax(-1)  # no negative zero
    levels = 2**fmt.dtype.code_bits - 1
    span = torch.where(high - low > SMALLEST, high - low, 0)
    step = _up_to_bfloat16(span / levels)
    codes = ((groups - low[..., None]) * _inverse(step)[..., None]).round()
    flat = codes.clamp(0, levels).to(torch.uint8).flatten(-2)
    if fmt.dtype is HostDtype.INT4:
        first, second = flat.unflatten(-1, (-1, 2, RUN // 2)).unbind(-2)
        flat = (first | second << 4).flatten(-2)
    parts = [flat, _bytes(step.to(torch.bfloat16)), _bytes(low.to(content.dtype))]
    return torch.cat(parts, -1)


def dequantize_pages(pages: Tensor, fmt: HostFormat, dtype: torch.dtype) -> Tensor:
    """The inverse: low + code * step, to the nearest of `dtype`.

    Args:
        pages: [..., head_block_bytes] uint8.
        dtype: of the cache.

    Returns:
        [..., numel].
    """
    codes, steps, lows = pages.split(
        [fmt.code_bytes, 2 * fmt.num_groups, fmt.head_block_bytes - fmt.lows_offset], -1
    )
    step = steps.contiguous().view(torch.bfloat16).float()[..., None]
    if fmt.dtype is HostDtype.FP8:
        values = codes.contiguous().view(torch.float8_e4m3fn).float()
        return (values.unflatten(-1, (fmt.num_groups, -1)) * step).to(dtype).flatten(-2)
    if fmt.dtype is HostDtype.INT4:
        runs = codes.unflatten(-1, (-1, RUN // 2))
        codes = torch.stack((runs & 15, runs >> 4), -2).flatten(-3)
    low = lows.contiguous().view(dtype).float()[..., None]
    levels = codes.unflatten(-1, (fmt.num_groups, -1)).float()
    return (low + levels * step).to(dtype).flatten(-2)


def _inverse(step: Tensor) -> Tensor:
    return torch.where(step > 0, 1 / step, 0)


def _up_to_bfloat16(x: Tensor) -> Tensor:
    """Non-negative float32 to the bfloat16 at or above it, as float32."""
    return (x.view(torch.int32) + 0xFFFF & -0x10000).view(torch.float32)


def _power_of_two(largest: Tensor) -> Tensor:
    """2^(e - 7) for 2^e <= largest < 2^(e + 1); 0 where the group is next to nothing."""
    binade = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where(largest > SMALLEST, binade * 2.0**-7, 0)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)
