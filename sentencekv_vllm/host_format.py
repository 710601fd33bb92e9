# SPDX-License-Identifier: Apache-2.0
"""How a quantised swap pool stores a head-block."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch


class HostDtype(IntEnum):
    """Codes of a quantised page. The numbers are those of `csrc/cpu/args.hpp`."""

    INT8 = 1
    INT4 = 2
    FP8 = 3  # e4m3, as torch.float8_e4m3fn

    @property
    def code_bits(self) -> int:
        return 4 if self is HostDtype.INT4 else 8

    @property
    def has_lows(self) -> bool:
        """Integer codes count up from the smallest element of their group."""
        return self is not HostDtype.FP8


GROUP_SIZES = (64, 32)
RUN = 32
"""Elements whose int4 codes share 16 bytes: byte i holds elements i (low half) and i + 16."""


@dataclass(frozen=True)
class HostFormat:
    """A head-block as `[codes | steps | lows]`, see `ops.quantize_pages`.

    A group is `group_size` consecutive elements of the head-block as it lies in the cache; it
    has one step (bfloat16) and, for integers, one low (the dtype of the cache).
    """

    dtype: HostDtype
    numel: int  # elements of a head-block, a multiple of group_size
    group_size: int  # elements
    element_bytes: int  # of the cache

    @property
    def num_groups(self) -> int:
        return self.numel // self.group_size

    @property
    def code_bytes(self) -> int:
        """Where the steps begin."""
        return self.numel * self.dtype.code_bits // 8

    @property
    def lows_offset(self) -> int:
        """Where the lows begin, in bytes."""
        return self.code_bytes + 2 * self.num_groups

    @property
    def head_block_bytes(self) -> int:
        lows = self.element_bytes * self.num_groups if self.dtype.has_lows else 0
        return self.lows_offset + lows


HOST_DTYPES: dict[str, HostDtype | None] = {
    "auto": None,
    **{dtype.name.lower(): dtype for dtype in HostDtype},
}
"""By the name of the setting `host_kv_dtype`; None: pages are byte copies."""


def host_format(name: str, block_size: int, head_dim: int, element_bytes: int) -> HostFormat | None:
    """The format of a model's pages; None for `auto`.

    Groups are the largest that divide `head_dim`, so that where a head-block holds plain rows no
    group crosses from one token, or from K to V, into another.

    Raises:
        ValueError: no group size divides the head dimension, or torch has no such type.
    """
    dtype = HOST_DTYPES[name]
    if dtype is None:
        return None
    if dtype is HostDtype.FP8 and not hasattr(torch, "float8_e4m3fn"):
        raise ValueError(
            f"host_kv_dtype 'fp8' needs torch.float8_e4m3fn, which torch {torch.__version__} "
            "lacks: set host_kv_dtype to 'int8'"
        )
    for size in GROUP_SIZES:
        if head_dim % size == 0:
            return HostFormat(dtype, 2 * block_size * head_dim, size, element_bytes)
    raise ValueError(
        f"host_kv_dtype {name!r} quantises groups of {GROUP_SIZES[-1]} channels or more, head_dim "
        f"{head_dim} is no multiple of {GROUP_SIZES[-1]}: set host_kv_dtype to 'auto'"
    )
