# SPDX-License-Identifier: Apache-2.0
"""How large a number may be, so that it holds in the type that it ends up in; and how a message
shows a value that somebody else has chosen."""

from __future__ import annotations

import reprlib
from typing import Any

INT32_MAX = 2**31 - 1
"""Largest page, row and block id of the tables on the device."""

MAX_TOKENS = 2**24
"""Largest count of tokens: some 16 times the longest context served, int32 and whole as float32
even where a few of them are multiplied by a number of blocks."""

MAX_RETENTION = 1e4
"""A bonus in units of a score, which is a softmax's exponent: 100 is as good as for ever, and
above 2^24 a float32 score would be lost in it."""

MAX_POOL_GIB = 2**16
"""64 TiB: bytes of it fit into int64 many times over."""

_SHOWN_DIGITS = 40


class _Repr(reprlib.Repr):
    """`repr`, cut in the middle; Python itself refuses to print an integer of 4,301 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100
        self.maxlist = self.maxtuple = self.maxdict = 8
        self.maxlevel = 4

    def repr_int(self, value: int, level: int) -> str:
        digits = int(value.bit_length() * 0.30103) + 1
        return repr(value) if digits <= _SHOWN_DIGITS else f"a number of {digits} digits"


def shown(value: object) -> str:
    """A value for a message: its `repr` on one line of bounded length, whatever it is."""
    return _Repr().repr(value)


def range_error(
    name: str, value: Any, low: float, high: float, above: float = float("-inf")
) -> str | None:
    """What is wrong with a number, or None: from `low` to `high`, greater than `above`.

    Compared before it is converted: an integer may be too large for a float.
    """
    if value != value or value in (float("inf"), float("-inf")):
        return f"{name} must be a finite number, got {value}"
    if value < low:
        return f"{name} must be at least {low:g}, got {shown(value)}"
    if value <= above:
        return f"{name} must be greater than {above:g}, got {shown(value)}"
    if value > high:
        return f"{name} must be at most {high:.12g}, got {shown(value)}"
    return None
