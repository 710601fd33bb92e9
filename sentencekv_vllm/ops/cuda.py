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

CHUNK_TOKENS, GRANULE = 1024, 16  # as in the kernels, and in triton_kernels/workspace.py
MAX_GROUP, MAX_CHANNELS = 8, 256  # of score_tokens and rank_sentences
QUANTIZED_DIMS = (64, 128, 256)  # of queries that score_tokens rotates itself
QUERY_TYPES = (torch.bfloat16, torch.float16, torch.float32)  # as in quantize_query.cuh
RANK_ARGUMENTS = 23  # of rank_sentences


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


class ScoreTokensArgs(Structure):
    """As in `csrc/include/sentencekv/score_tokens.cuh`."""

    _fields_ = (
        *((name, c_void_p) for name in (
            "bits", "scales", "query", "rotation", "levels", "steps", "pages", "num_pages",
            "sentence_ends", "num_sentences", "first", "history_lo", "history_hi", "index_kind",
            "reduce", "byte_rows", "best", "partial",
        )),
        *((name, c_int64) for name in ("pages_stride", "ends_stride", "first_stride")),
        ("scale", c_float),
        *((name, c_int32) for name in (
            "num_requests", "num_heads", "group", "num_byte_rows", "block_size", "max_pages",
            "max_sentences", "max_chunks", "scales_are_bf16", "query_type", "token_bits",
            "softmax_mean", "granules_per_page", "page_factor",  # the last two by the launcher
        )),
    )  # fmt: skip


class RankSentencesArgs(Structure):
    """As in `csrc/include/sentencekv/rank_sentences.cuh`."""

    _fields_ = (
        *((name, c_void_p) for name in (
            "best", "partial", "row_pages", "kept", "num_pages", "sentence_ends",
            "num_sentences", "first", "history_lo", "history_hi", "budget_blocks", "index_kind",
            "reduce", "retention", "seeds", "step", "scores", "mass", "blocks", "coverage",
        )),
        *((name, c_int64) for name in ("row_pages_stride", "ends_stride", "first_stride")),
        *((name, c_int32) for name in (
            "num_requests", "num_heads", "group", "block_size", "rows_per_page", "max_sentences",
            "max_chunks", "max_selected", "max_blocks", "chunk_tokens", "token_bits", "random",
            "softmax_mean", "max_of_group",
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
        ("rank", RankSentencesArgs),
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
        ("score_tokens", ScoreTokensArgs),
        ("rank_sentences", RankSentencesArgs),
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

    def score_tokens(
        self,
        bits: Tensor,
        scales: Tensor,
        query: Tensor | None,
        rotation: Tensor | None,
        levels: Tensor,
        steps: Tensor,
        pages: Tensor,
        num_pages: Tensor,
        sentence_ends: Tensor,
        num_sentences: Tensor,
        first: Tensor,
        history_lo: Tensor,
        history_hi: Tensor,
        index_kind: Tensor,
        reduce: Tensor,
        byte_rows: Tensor,
        best: Tensor,
        partial: Tensor,
        scale: float,
    ) -> None:
        """See `triton_kernels.score_tokens`, whose twin it is, with `quantize_query` before it.

        Args:
            bits: [P, H, E / 8, N] uint8; scales: [P, H, N] bf16 or fp16.
            query: [S, H * G, D] contiguous, D = E in `QUANTIZED_DIMS`, bf16, fp16 or float32; None:
                it is quantised in `levels` and `steps`, which are not read otherwise.
            rotation: [D, D] float32, that of `ops.rotation`; with a query only.
            levels: [>= S, H * G, E] int8, G at most 8; steps: [>= S, H * G] float32.
            pages, sentence_ends, first: [>= S, .]; rows may lie apart.
            best: [>= S, H, I, G], raised; partial: [>= S, H, chunks, 2, G] float32, written.
            scale: of the logits.
        """
        requests, (_, num_heads, byte_rows_kept, block_size) = len(num_pages), bits.shape
        rows = (pages, sentence_ends, first)
        whole = (num_pages, num_sentences, history_lo, history_hi, index_kind, reduce, byte_rows)
        assert all(t.dtype == torch.int32 for t in (*rows, *whole, best))
        assert all(t.stride(-1) == 1 for t in rows)
        assert all(t.is_contiguous() for t in (*whole, bits, scales, levels, steps, best, partial))
        assert scales.dtype in (torch.bfloat16, torch.float16) and levels.dtype == torch.int8
        query_type = 0
        if query is not None:
            assert rotation is not None and rotation.is_contiguous() and query.is_contiguous()
            assert rotation.shape == (query.shape[-1], 8 * byte_rows_kept)
            assert query.shape[-1] == 8 * byte_rows_kept and query.shape[-1] in QUANTIZED_DIMS
            query_type = QUERY_TYPES.index(query.dtype)
        tensors = (
            *(bits, scales, query, rotation, levels, steps, pages, num_pages, sentence_ends),
            *(num_sentences, first, history_lo, history_hi, index_kind, reduce, byte_rows),
            *(best, partial),
        )
        args = ScoreTokensArgs(
            *(None if t is None else t.data_ptr() for t in tensors),
            *(pages.stride(0), sentence_ends.stride(0), first.stride(0)),
            scale,
            *(requests, num_heads, best.shape[3], byte_rows_kept, block_size),
            *(pages.shape[1], best.shape[2], partial.shape[2]),
            *(scales.dtype == torch.bfloat16, query_type),
            *(IndexKind.TOKEN_BITS, Reduce.SOFTMAX_MEAN),
        )
        self._call("score_tokens", args, best)

    def rank_sentences(self, *tensors_and_sizes: Any) -> None:
        """From `best` to the selection: the reduction over the group and `ops.select_blocks`;
        arguments as in `_rank_args`."""
        self._call("rank_sentences", self._rank_args(*tensors_and_sizes), tensors_and_sizes[0])

    def decode_selection(self, *tensors_and_sizes: Any) -> None:
        """`rank_sentences`, `resolve_residency` and `gather_misses` in one launch.

        Args:
            tensors_and_sizes: those of `rank_sentences`; of `resolve_residency` from `pages` on
                those that are not among them; `host` and `cache` of `gather_misses`.
        """
        rank, rest = tensors_and_sizes[:RANK_ARGUMENTS], tensors_and_sizes[RANK_ARGUMENTS:]
        pages, private_blocks, page_slot, slot_page, slot_stamp, *written, host, cache = rest
        budget_blocks, step, blocks, coverage = (rank[i] for i in (10, 15, 18, 19))
        head_tables, misses, miss_counts, *totals = written
        args = DecodeSelectionArgs(
            self._rank_args(*rank),
            self._resolve_args(
                *(blocks, coverage, pages, private_blocks, budget_blocks, rank[8], step),
                *(page_slot, slot_page, slot_stamp, head_tables, misses, miss_counts, *totals),
            ),
            self._gather_args(host, cache, misses, miss_counts[: len(budget_blocks)]),
        )
        self._call("decode_selection", args, blocks)

    def _rank_args(
        self,
        best: Tensor,
        partial: Tensor,
        row_pages: Tensor,
        kept: Tensor,
        num_pages: Tensor,
        sentence_ends: Tensor,
        num_sentences: Tensor,
        first: Tensor,
        history_lo: Tensor,
        history_hi: Tensor,
        budget_blocks: Tensor,
        index_kind: Tensor,
        reduce: Tensor,
        retention: Tensor,
        seeds: Tensor,
        step: Tensor,
        scores: Tensor,
        mass: Tensor,
        blocks: Tensor,
        coverage: Tensor,
        block_size: int,
        rows_per_page: int,
        max_blocks: int,
    ) -> RankSentencesArgs:
        """Check and pack.

        Args:
            best: [>= S, H, I, G], G at most 8, emptied; partial: as `score_tokens` leaves it.
            row_pages, sentence_ends, first: [>= S, .]; rows may lie apart.
            kept: [P * M, H] uint8, written; retention: [S] float32; step: [1].
            scores: [>= S, H, I] float32; mass: [>= S, H, I + 1] float32; written.
            blocks: [>= S, H, K]; coverage: [>= S, H] float32; written.
            max_blocks: of the longest request, at most 8192.
        """
        requests, (_, num_heads, max_sentences, group) = len(num_pages), best.shape
        rows = (row_pages, sentence_ends, first)
        whole = (
            *(num_pages, num_sentences, history_lo, history_hi, budget_blocks),
            *(index_kind, reduce, seeds, step),
        )
        assert all(t.dtype == torch.int32 for t in (*rows, *whole, best, blocks))
        assert all(t.stride(-1) == 1 for t in rows)
        floats = (partial, retention, scores, mass, coverage)
        assert all(t.dtype == torch.float32 for t in floats) and kept.dtype == torch.uint8
        assert all(t.is_contiguous() for t in (*whole, *floats, best, kept, blocks))
        tensors = (
            *(best, partial, row_pages, kept, num_pages, sentence_ends, num_sentences, first),
            *(history_lo, history_hi, budget_blocks, index_kind, reduce, retention, seeds, step),
            *(scores, mass, blocks, coverage),
        )
        args = RankSentencesArgs(
            *(t.data_ptr() for t in tensors),
            *(row_pages.stride(0), sentence_ends.stride(0), first.stride(0)),
            *(requests, num_heads, group, block_size, rows_per_page, max_sentences),
            *(partial.shape[2], blocks.shape[2], max_blocks, CHUNK_TOKENS),
            *(IndexKind.TOKEN_BITS, IndexKind.RANDOM, Reduce.SOFTMAX_MEAN, Reduce.MAX),
        )
        return args

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
