# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels as torch ops `sentencekv::...`, with the arguments they write declared.

Where the library cannot be built, `library()` is None, the log says why, and the Triton
kernels of the same names are used.
"""

from __future__ import annotations

import ctypes
import logging
from ctypes import POINTER, Structure, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .cuda_build import build_cuda
from .native_build import BuildError

logger = logging.getLogger(__name__)


class ResolveResidencyArgs(Structure):
    """As in `csrc/include/sentencekv/resolve_residency.cuh`."""

    _fields_ = (
        *((name, c_void_p) for name in (
            "blocks", "coverage", "pages", "private_blocks", "budget_blocks", "history_lo",
            "step", "page_slot", "slot_page", "slot_stamp", "head_tables", "misses",
            "miss_counts", "hit_totals", "miss_totals", "coverage_totals",
        )),
        *((name, c_int64) for name in (
            "pages_stride", "private_stride", "table_stride", "table_head_stride",
        )),
        *((name, c_int32) for name in ("num_requests", "num_heads", "max_blocks", "num_slots")),
    )  # fmt: skip


class GatherMissesArgs(Structure):
    """As in `csrc/include/sentencekv/swap_blocks.cuh`."""

    _fields_ = (
        *((name, c_void_p) for name in ("host", "cache", "misses", "miss_counts")),
        *((n, c_int64) for n in ("head_block_bytes", "cache_block_stride", "cache_head_stride")),
        *((name, c_int32) for name in ("num_regions", "max_blocks", "num_heads")),
    )


class CopyPagesArgs(Structure):
    """As in `csrc/include/sentencekv/swap_blocks.cuh`."""

    _fields_ = (
        *((name, c_void_p) for name in ("source", "target", "pairs")),
        *((name, c_int64) for name in ("page_bytes", "source_stride", "target_stride")),
        ("num_pairs", c_int32),
    )


def load(path: Path) -> ctypes.CDLL:
    """A library with the C ABI of `csrc/*.cu`."""
    lib = ctypes.CDLL(str(path))
    for name, args in (
        ("resolve_residency", ResolveResidencyArgs),
        ("gather_misses", GatherMissesArgs),
        ("copy_pages", CopyPagesArgs),
        ("copy_page_runs", CopyPagesArgs),
    ):
        function = getattr(lib, f"sentencekv_{name}")
        function.argtypes, function.restype = [POINTER(args), c_void_p], c_int32
    lib.sentencekv_error_string.argtypes = [c_int32]
    lib.sentencekv_error_string.restype = ctypes.c_char_p
    return lib


@cache
def library() -> ctypes.CDLL | None:
    """The kernels built with nvcc, or None, logged once."""
    try:
        return load(build_cuda())
    except (BuildError, OSError) as error:
        logger.warning("no CUDA kernels, the Triton ones are used instead: %s", error)
        return None


class Launcher:
    """Checks tensors and calls the C ABI on the current stream of their device.

    Tensors are int32, contiguous and on the GPU unless said otherwise; the current device is
    theirs. Nothing is allocated on the device and nothing waits.
    """

    def __init__(self, lib: ctypes.CDLL) -> None:
        self._lib = lib

    def resolve_residency(
        self,
        blocks: Tensor,
        coverage: Tensor,
        pages: Tensor,
        private_blocks: Tensor,
        budget_blocks: Tensor,
        history_lo: Tensor,
        step: Tensor,
        page_slot: Tensor,
        slot_page: Tensor,
        slot_stamp: Tensor,
        head_tables: Tensor,
        misses: Tensor,
        miss_counts: Tensor,
        hit_totals: Tensor,
        miss_totals: Tensor,
        coverage_totals: Tensor,
    ) -> None:
        """See `ops.resolve_residency`; the misses of request s and KV head h, in order of the
        selection, are `misses[s, h, : miss_counts[s, h]]`, rows (page, KV head, block).

        Args:
            blocks: [>= S, H, K]; coverage: [>= S, H] float32.
            pages: [S, max_pages]; private_blocks: [S, R], K <= R; rows may lie apart.
            budget_blocks, history_lo: [S]; step: [1].
            page_slot: [P, H]; slot_page, slot_stamp: [B, H]; all written.
            head_tables: [S, H, W], written as in `LayerOps.decode_layer`; rows may lie apart.
            misses: [>= S, H, K, 3]; miss_counts: [>= S, H]; written.
            hit_totals, miss_totals: [S] int64; coverage_totals: [S] float32; added to.
        """
        num_requests, num_slots = private_blocks.shape
        num_heads, max_blocks = blocks.shape[1:]
        assert max_blocks <= num_slots, (
            f"a request has {num_slots} slots and may select {max_blocks} blocks: "
            f"the working set needs at least {max_blocks}"
        )
        assert misses.shape == (*blocks.shape, 3) and miss_counts.shape == coverage.shape
        rows = (pages, private_blocks, head_tables)
        whole = (
            *(blocks, budget_blocks, history_lo, step),
            *(page_slot, slot_page, slot_stamp, misses, miss_counts),
        )
        assert all(t.dtype == torch.int32 for t in (*rows, *whole))
        assert all(t.stride(-1) == 1 for t in rows) and all(t.is_contiguous() for t in whole)
        assert hit_totals.dtype == miss_totals.dtype == torch.int64
        assert coverage.dtype == coverage_totals.dtype == torch.float32
        tensors = (
            *(blocks, coverage, pages, private_blocks, budget_blocks, history_lo, step),
            *(page_slot, slot_page, slot_stamp, head_tables, misses, miss_counts),
            *(hit_totals, miss_totals, coverage_totals),
        )
        args = ResolveResidencyArgs(
            *(t.data_ptr() for t in tensors),
            *(pages.stride(0), private_blocks.stride(0), *head_tables.stride()[:2]),
            *(num_requests, num_heads, max_blocks, num_slots),
        )
        self._call("resolve_residency", args, blocks)

    def gather_misses(
        self, host: Tensor, cache: Tensor, misses: Tensor, miss_counts: Tensor
    ) -> None:
        """Copy the head-blocks that `resolve_residency` listed.

        Args:
            host: [P, H, N, 2D] pinned; cache: [B, H, N, 2D] of contiguous head-blocks, written;
                the same dtype.
        """
        assert host.shape[1:] == cache.shape[1:] and host.dtype == cache.dtype
        assert cache[0, 0].is_contiguous(), "a head-block is contiguous"
        assert all(t.is_contiguous() for t in (host, misses, miss_counts))
        size = cache.element_size()
        args = GatherMissesArgs(
            *(t.data_ptr() for t in (host, cache, misses, miss_counts)),
            *(cache[0, 0].numel() * size, cache.stride(0) * size, cache.stride(1) * size),
            *(miss_counts.numel(), misses.shape[-2], cache.shape[1]),
        )
        self._call("gather_misses", args, cache)

    def copy_pages(self, source: Tensor, target: Tensor, pairs: Tensor) -> None:
        """Copy whole pages between the cache and the swap pool, in either direction.

        Args:
            source, target: [pages, H, N, 2D], each page contiguous, the one on the CPU pinned;
                target is written.
            pairs: [n, 2] (page of source, page of target).
        """
        self._call("copy_pages", _page_args(source, target, pairs), pairs)

    def copy_page_runs(self, source: Tensor, target: Tensor, pairs: Tensor) -> None:
        """`copy_pages` through the copy engines; neighbouring pages are one copy.

        Args:
            pairs: on the CPU; not needed after the call.
        """
        on_device = target if target.is_cuda else source
        self._call("copy_page_runs", _page_args(source, target, pairs), on_device)

    def _call(self, name: str, args: Structure, on_device: Tensor) -> None:
        stream = torch.cuda.current_stream().cuda_stream if on_device.is_cuda else None
        status = getattr(self._lib, f"sentencekv_{name}")(args, stream)
        if status:
            reason = self._lib.sentencekv_error_string(status).decode()
            raise RuntimeError(f"{name} could not be launched: {reason} (CUDA error {status})")


def _page_args(source: Tensor, target: Tensor, pairs: Tensor) -> CopyPagesArgs:
    assert source.shape[1:] == target.shape[1:] and source.dtype == target.dtype
    assert pairs.dtype == torch.int32
    assert source[0].is_contiguous() and target[0].is_contiguous(), "a page is contiguous"
    assert pairs.is_contiguous()
    size = source.element_size()
    return CopyPagesArgs(
        *(source.data_ptr(), target.data_ptr(), pairs.data_ptr()),
        *(source[0].numel() * size, source.stride(0) * size, target.stride(0) * size),
        len(pairs),
    )
