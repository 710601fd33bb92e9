# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels as torch ops `sentencekv::...`, with the arguments they write declared.

Where the library cannot be built, `library()` is None, the log says why, and the Triton
kernels of the same names are used.
"""

from __future__ import annotations

import ctypes
import logging
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..types import IndexKind, Reduce
from .cuda_build import build_cuda
from .native_build import BuildError

logger = logging.getLogger(__name__)

MAX_GROUP, MAX_BLOCKS = 8, 8192  # of `rank`: query heads a KV head, blocks of a request
MAX_PLANES = 256  # of `score_blocks`
ALIGNMENT = 16  # bytes: of what `score_blocks` loads as vectors
QUERY_TYPES = (torch.bfloat16, torch.float16, torch.float32)  # as in quantize_query.cuh
RANK_ARGUMENTS = 26  # of `rank`, among which are these
PAGES, STEP, LO, BUDGET, BLOCKS, COVERAGE = 2, 12, 16, 18, 21, 22


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


class QuantizeQueryArgs(Structure):
    """As in `csrc/include/sentencekv/quantize_query.cuh`."""

    _fields_ = (
        *((name, c_void_p) for name in (
            "query", "map", "index_kind", "levels", "steps", "mean_levels", "mean_steps",
        )),
        *((name, c_int32) for name in (
            "num_requests", "num_heads", "group", "head_dim", "code_width", "bits", "query_type",
            "token_codes",
        )),
    )  # fmt: skip


class ScoreBlocksArgs(Structure):
    """As in `csrc/include/sentencekv/score_blocks.cuh`."""

    _fields_ = (
        *((name, c_void_p) for name in (
            "codes", "scales", "means", "mean_scales", "levels", "steps", "mean_levels",
            "mean_steps", "pages", "num_pages", "index_kind", "tops", "sums",
        )),
        ("pages_stride", c_int64),
        ("unit", c_float),
        *((name, c_int32) for name in (
            "num_requests", "num_heads", "group", "num_byte_rows", "head_dim", "block_size",
            "columns", "max_blocks", "token_codes",
            "granules_per_page", "pages_per_chunk",  # by the launcher
        )),
    )  # fmt: skip


class RankArgs(Structure):
    """As in `csrc/include/sentencekv/rank_args.cuh`."""

    _fields_ = (
        *((name, c_void_p) for name in (
            "tops", "sums", "pages", "page_kept", "best", "row_pages", "kept", "sentence_ends",
            "num_sentences", "first", "reduce", "seeds", "step", "scores", "mass", "num_pages",
            "history_lo", "history_hi", "budget_blocks", "index_kind", "retention", "blocks",
            "coverage",
        )),
        *((name, c_int64) for name in (
            "pages_stride", "row_pages_stride", "ends_stride", "first_stride",
        )),
        *((name, c_int32) for name in (
            "num_requests", "num_heads", "group", "block_size", "rows_per_page", "max_sentences",
            "max_selected", "max_blocks", "mass_blocks", "token_codes", "random", "softmax_mean",
            "max_of_group",
        )),
    )  # fmt: skip


class GatherMissesArgs(Structure):
    """As in `csrc/include/sentencekv/swap_blocks.cuh`."""

    _fields_ = (
        *((name, c_void_p) for name in ("host", "cache", "misses", "miss_counts")),
        *((n, c_int64) for n in ("head_block_bytes", "cache_block_stride", "cache_head_stride")),
        *((name, c_int32) for name in ("num_regions", "max_blocks", "num_heads")),
    )


class DecodeSelectionArgs(Structure):
    """As in `csrc/include/sentencekv/decode_selection.cuh`."""

    _fields_ = (
        ("rank", RankArgs),
        ("resolve", ResolveResidencyArgs),
        ("gather", GatherMissesArgs),
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
        ("quantize_query", QuantizeQueryArgs),
        ("score_blocks", ScoreBlocksArgs),
        ("rank", RankArgs),
        ("resolve_residency", ResolveResidencyArgs),
        ("decode_selection", DecodeSelectionArgs),
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

    def resolve_residency(self, *tensors: Tensor) -> None:
        """See `ops.resolve_residency`; arguments as in `_resolve_args`. The misses of request s and
        KV head h, in order of the selection, are `misses[s, h, : miss_counts[s, h]]`, rows
        (page, KV head, block)."""
        self._call("resolve_residency", self._resolve_args(*tensors), tensors[0])

    def _resolve_args(
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
    ) -> ResolveResidencyArgs:
        """Check and pack.

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
        return ResolveResidencyArgs(
            *(t.data_ptr() for t in tensors),
            *(pages.stride(0), private_blocks.stride(0), *head_tables.stride()[:2]),
            *(num_requests, num_heads, max_blocks, num_slots),
        )

    def quantize_query(
        self,
        query: Tensor,
        query_map: Tensor,
        index_kind: Tensor,
        levels: Tensor,
        steps: Tensor,
        mean_levels: Tensor,
        mean_steps: Tensor,
        bits: int,
    ) -> None:
        """See `ops.quantize_query`; of the requests of TOKEN_CODES.

        Args:
            query: [S, H * G, D] contiguous, D a multiple of 16 up to 256, bf16, fp16 or float32.
            query_map: [H, D, D] float32.
            index_kind: [S].
            levels: [>= S, H * G, W] int8; mean_levels: [>= S, H * G, D] int8; steps, mean_steps:
                [>= S, H * G] float32; written.
            bits: of a code, 1 or 2.
        """
        (num_requests, query_heads, dim), num_heads = query.shape, len(query_map)
        assert query_map.shape == (num_heads, dim, dim) and mean_levels.shape[1:] == query.shape[1:]
        assert index_kind.dtype == torch.int32 and query_map.dtype == torch.float32
        assert levels.dtype == mean_levels.dtype == torch.int8
        assert steps.dtype == mean_steps.dtype == torch.float32
        written = (levels, steps, mean_levels, mean_steps)
        assert all(t.is_contiguous() for t in (query, query_map, index_kind, *written))
        args = QuantizeQueryArgs(
            *(t.data_ptr() for t in (query, query_map, index_kind, *written)),
            *(num_requests, num_heads, query_heads // num_heads, dim, levels.shape[2], bits),
            *(QUERY_TYPES.index(query.dtype), IndexKind.TOKEN_CODES),
        )
        self._call("quantize_query", args, levels)

    def score_blocks(
        self,
        codes: Tensor,
        scales: Tensor,
        means: Tensor,
        mean_scales: Tensor,
        levels: Tensor,
        steps: Tensor,
        mean_levels: Tensor,
        mean_steps: Tensor,
        pages: Tensor,
        num_pages: Tensor,
        index_kind: Tensor,
        tops: Tensor,
        sums: Tensor,
        unit: float,
    ) -> None:
        """See `ops.score_blocks`; of the requests of TOKEN_CODES.

        Args:
            codes: [P, H, W / 8, N] uint8, W at most 256; scales: [P, H, N] bf16.
            means: [P, H, D] int8; mean_scales: [P, H] float32.
            levels, steps, mean_levels, mean_steps: as `quantize_query` leaves them.
            pages: [S, .], rows may lie apart; num_pages, index_kind: [S].
            tops, sums: [>= S, H, G, B], G at most 8; written up to `num_pages`.
            unit: `ops.score_blocks.unit_factor` of the scale of the logits.
        """
        requests, (_, num_heads, byte_rows, block_size) = len(num_pages), codes.shape
        assert all(t.dtype == torch.int32 for t in (pages, num_pages, index_kind, tops, sums))
        assert codes.dtype == torch.uint8 and scales.dtype == torch.bfloat16
        assert means.dtype == levels.dtype == mean_levels.dtype == torch.int8
        assert all(t.dtype == torch.float32 for t in (mean_scales, steps, mean_steps))
        assert levels.shape[2] == 8 * byte_rows and mean_levels.shape[2] == means.shape[2]
        assert tops.shape == sums.shape and tops.shape[3] >= pages.shape[1]
        assert pages.stride(-1) == 1
        vectors = (codes, scales, means)
        assert all(t.data_ptr() % ALIGNMENT == 0 for t in vectors), "vectors are aligned"
        tensors = (
            *(codes, scales, means, mean_scales, levels, steps, mean_levels, mean_steps),
            *(pages, num_pages, index_kind, tops, sums),
        )
        assert all(t.is_contiguous() for t in tensors if t is not pages)
        args = ScoreBlocksArgs(
            *(t.data_ptr() for t in tensors),
            pages.stride(0),
            unit,
            *(requests, num_heads, tops.shape[2], byte_rows, means.shape[2], block_size),
            *(pages.shape[1], tops.shape[3], IndexKind.TOKEN_CODES),
        )
        self._call("score_blocks", args, tops)

    def rank(self, *tensors_and_sizes: Any) -> None:
        """From `score_blocks`, or from `best`, to the selection: `ops.rank_blocks`, or the
        reduction over the group and `ops.select_blocks`; arguments as in `_rank_args`."""
        args = self._rank_args(*tensors_and_sizes)
        self._call("rank", args, tensors_and_sizes[BLOCKS])

    def decode_selection(self, *tensors_and_sizes: Any) -> None:
        """`rank`, `resolve_residency` and `gather_misses` in one launch.

        Args:
            tensors_and_sizes: those of `rank`; of `resolve_residency` those that are not among
                them, from `private_blocks` on; `host` and `cache` of `gather_misses`.
        """
        rank, rest = tensors_and_sizes[:RANK_ARGUMENTS], tensors_and_sizes[RANK_ARGUMENTS:]
        private_blocks, page_slot, slot_page, slot_stamp, *written, host, cache = rest
        pages, step, history_lo, budget_blocks = (rank[i] for i in (PAGES, STEP, LO, BUDGET))
        blocks, coverage = rank[BLOCKS], rank[COVERAGE]
        head_tables, misses, miss_counts, *totals = written
        args = DecodeSelectionArgs(
            self._rank_args(*rank),
            self._resolve_args(
                *(blocks, coverage, pages, private_blocks, budget_blocks, history_lo, step),
                *(page_slot, slot_page, slot_stamp, head_tables, misses, miss_counts, *totals),
            ),
            self._gather_args(host, cache, misses, miss_counts[: len(budget_blocks)]),
        )
        self._call("decode_selection", args, blocks)

    def _rank_args(
        self,
        tops: Tensor,
        sums: Tensor,
        pages: Tensor,
        page_kept: Tensor | None,
        best: Tensor,
        row_pages: Tensor,
        kept: Tensor | None,
        sentence_ends: Tensor,
        num_sentences: Tensor,
        first: Tensor,
        reduce: Tensor,
        seeds: Tensor,
        step: Tensor,
        scores: Tensor,
        mass: Tensor,
        num_pages: Tensor,
        history_lo: Tensor,
        history_hi: Tensor,
        budget_blocks: Tensor,
        index_kind: Tensor,
        retention: Tensor,
        blocks: Tensor,
        coverage: Tensor,
        block_size: int,
        rows_per_page: int,
        group: int,
    ) -> RankArgs:
        """Check and pack.

        Args:
            tops, sums: [>= S, H, G, B], G at most 8, as `score_blocks` leaves them; without
                elements where no request is one of TOKEN_CODES, and page_kept None.
            page_kept: [P, H] uint8, written.
            best: [>= S, H, I, G], emptied; without elements where rows hold no vector, kept None.
            kept: [P * M, H] uint8, written; retention: [S] float32; step: [1].
            pages, row_pages, sentence_ends, first: [>= S, .]; rows may lie apart; at most 8192
                blocks a request.
            scores, mass: [>= S, H, I] float32; written.
            blocks: [>= S, H, K]; coverage: [>= S, H] float32; written.
            group: G.
        """
        requests, (num_heads, max_sentences) = len(num_pages), scores.shape[1:]
        rows = (pages, row_pages, sentence_ends, first)
        whole = (
            *(tops, sums, best, num_sentences, reduce, seeds, step, num_pages, history_lo),
            *(history_hi, budget_blocks, index_kind, blocks),
        )
        assert all(t.dtype == torch.int32 for t in (*rows, *whole))
        assert all(t.stride(-1) == 1 for t in rows)
        floats, flags = (scores, mass, retention, coverage), (page_kept, kept)
        assert all(t.dtype == torch.float32 for t in floats) and mass.shape == scores.shape
        assert all(t is None or t.dtype == torch.uint8 and t.is_contiguous() for t in flags)
        assert all(t.is_contiguous() for t in (*whole, *floats))
        assert tops.shape == sums.shape and (kept is None or best.shape[2] == max_sentences)
        tensors = (
            *(tops, sums, pages, page_kept, best, row_pages, kept, sentence_ends, num_sentences),
            *(first, reduce, seeds, step, scores, mass, num_pages, history_lo, history_hi),
            *(budget_blocks, index_kind, retention, blocks, coverage),
        )
        return RankArgs(
            *(None if t is None else t.data_ptr() for t in tensors),
            *(t.stride(0) for t in rows),
            *(requests, num_heads, group, block_size, rows_per_page, max_sentences),
            *(blocks.shape[2], pages.shape[1], tops.shape[3]),
            *(IndexKind.TOKEN_CODES, IndexKind.RANDOM, Reduce.SOFTMAX_MEAN, Reduce.MAX),
        )

    def gather_misses(
        self, host: Tensor, cache: Tensor, misses: Tensor, miss_counts: Tensor
    ) -> None:
        """Copy the head-blocks that `resolve_residency` listed.

        Args:
            host: [P, H, N, 2D] pinned; cache: [B, H, N, 2D] of contiguous head-blocks, written;
                the same dtype.
        """
        args = self._gather_args(host, cache, misses, miss_counts)
        self._call("gather_misses", args, cache)

    def _gather_args(
        self, host: Tensor, cache: Tensor, misses: Tensor, miss_counts: Tensor
    ) -> GatherMissesArgs:
        assert host.shape[1:] == cache.shape[1:] and host.dtype == cache.dtype
        assert cache[0, 0].is_contiguous(), "a head-block is contiguous"
        assert all(t.is_contiguous() for t in (host, misses, miss_counts))
        size = cache.element_size()
        return GatherMissesArgs(
            *(t.data_ptr() for t in (host, cache, misses, miss_counts)),
            *(cache[0, 0].numel() * size, cache.stride(0) * size, cache.stride(1) * size),
            *(miss_counts.numel(), misses.shape[-2], cache.shape[1]),
        )

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
