# SPDX-License-Identifier: Apache-2.0
"""Floats as int32 of the same order, so that a maximum may be an integer atomic."""

import triton
import triton.language as tl

LOWEST = -(2**31)  # below the code of every float, -inf included


@triton.jit
def to_ordered(x):
    """float32 -> int32; -0.0 sorts just below 0.0."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(code):
    """The inverse of `to_ordered`."""
    return (code ^ ((code >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
