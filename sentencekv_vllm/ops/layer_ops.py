# SPDX-License-Identifier: Apache-2.0
"""The calls a worker makes per layer, and their plain PyTorch definition."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..types import Geometry, IndexKind, LayerPools, Selection, SparseBatch
from .estimate_unselected import Attended, estimate_unselected
from .index_pages import index_pages
from .index_sentences import index_sentences
from .rank_blocks import rank_blocks
from .resolve_residency import resolve_residency
from .score_blocks import score_blocks
from .score_sentences import score_sentences
from .select_blocks import select_blocks
from .swap_blocks import swap_in


@dataclass(frozen=True)
class DecodeOutputs:
    """Caller-owned buffers that `decode_layer` writes or adds to."""

    head_tables: Tensor  # [S, H, W] int32: columns [lo, lo + budget) of each row are written
    hits: Tensor  # [S] int64, added to: head-blocks found resident
    misses: Tensor  # [S] int64, added to: head-blocks copied from the swap pool
    coverage: Tensor  # [S] float32, added to: mean over KV heads of Selection.coverage
    stage_ns: Tensor  # [4] int64, added to: score, select, resolve, swap


class LayerOps(Protocol):
    """What an implementation (reference, C++, Triton, CUDA) offers."""

    name: str

    def index_pages(
        self,
        pools: LayerPools,
        block_ids: Tensor,
        page_ids: Tensor,
        key_offset: Tensor,
    ) -> None:
        """See `ops.index_pages.index_pages`."""

    def index_sentences(
        self,
        pools: LayerPools,
        rows: Tensor,
        spans: Tensor,
        span_blocks: Tensor,
        key_offset: Tensor,
        kind: IndexKind = IndexKind.CENTROID,
    ) -> None:
        """See `ops.index_sentences.index_sentences`."""

    def set_step(self, step: int) -> None:
        """Before the layers of a step: `SparseBatch.step`, where kernels read it from memory."""

    def begin_step(self, batch: SparseBatch) -> None:
        """Before the layers of a step: find out what all of them need of the batch."""

    def decode_layer(
        self,
        geometry: Geometry,
        pools: LayerPools,
        batch: SparseBatch,
        query: Tensor,
        out: DecodeOutputs,
    ) -> None:
        """Score, select, resolve and swap in for every request and KV head of a layer.

        After it, `head_tables[s, h, lo + k]` is the head-block id `slot * H + h` of the k-th
        selected block, ascending, and the cache holds its content.

        Args:
            query: [S, H * G, D] contiguous, the query that ranks (bf16, fp16 or fp32).
        """

    def reuse_selection(self, pools: LayerPools, batch: SparseBatch, out: DecodeOutputs) -> None:
        """`decode_layer` for a layer that shares the selection of the last call of it.

        Nothing is scored: the blocks are resolved and swapped in, `kept` and the index are
        not read. Hits, misses and coverage are added as there.

        Args:
            batch: that of the last `decode_layer`.
        """

    def estimate_unselected(
        self,
        geometry: Geometry,
        pools: LayerPools,
        batch: SparseBatch,
        estimates: Tensor,
        query: Tensor,
        attended: Attended,
        output: Tensor,
    ) -> None:
        """See `ops.estimate_unselected.estimate_unselected`; `step` is that of the batch."""


def _merged(codes: Tensor, by_blocks: Selection, by_sentences: Selection) -> Selection:
    """Rows of the first where `codes`, [S], is set, else of the second."""
    blocks = by_blocks.blocks.where(codes[:, None, None], by_sentences.blocks)
    return Selection(blocks, by_blocks.coverage.where(codes[:, None], by_sentences.coverage))


class ReferenceOps:
    """Stage after stage in plain PyTorch: the definition, and the fallback."""

    name = "reference"

    def __init__(self) -> None:
        self.index_pages = index_pages
        self.index_sentences = index_sentences
        self._selection: Selection | None = None

    def set_step(self, step: int) -> None:
        """Nothing: the batch has it."""

    def begin_step(self, batch: SparseBatch) -> None:
        """Nothing."""

    def decode_layer(
        self,
        geometry: Geometry,
        pools: LayerPools,
        batch: SparseBatch,
        query: Tensor,
        out: DecodeOutputs,
    ) -> None:
        clock = [time.perf_counter_ns()]
        codes = batch.index_kind == IndexKind.TOKEN_CODES
        masses = score_blocks(geometry, pools, batch, query) if codes.any() else None
        scores, mass = score_sentences(geometry, pools, batch, query)
        clock.append(time.perf_counter_ns())
        selection = select_blocks(geometry, pools, batch, scores, mass)
        if masses is not None:
            selection = _merged(codes, rank_blocks(geometry, pools, batch, masses), selection)
        self._selection = selection
        clock.append(time.perf_counter_ns())
        self._attendable(pools, batch, selection, out, clock)

    def reuse_selection(self, pools: LayerPools, batch: SparseBatch, out: DecodeOutputs) -> None:
        assert self._selection is not None, "a layer before this one ranks"
        clock = [time.perf_counter_ns()] * 3
        self._attendable(pools, batch, self._selection, out, clock)

    def estimate_unselected(
        self,
        geometry: Geometry,
        pools: LayerPools,
        batch: SparseBatch,
        estimates: Tensor,
        query: Tensor,
        attended: Attended,
        output: Tensor,
    ) -> None:
        estimate_unselected(geometry, pools, batch, batch.step, estimates, query, attended, output)

    @staticmethod
    def _attendable(
        pools: LayerPools,
        batch: SparseBatch,
        selection: Selection,
        out: DecodeOutputs,
        clock: list[int],
    ) -> None:
        """Resolve, swap in and add up; `clock` has the times before, after score and select."""
        residency = resolve_residency(pools, batch, selection)
        clock.append(time.perf_counter_ns())
        swap_in(pools, residency.misses)
        heads = pools.page_slot.shape[1]
        for s in range(len(batch.budget_blocks)):
            lo, budget = int(batch.history_lo[s]), int(batch.budget_blocks[s])
            slots = residency.slots[s, :, :budget]
            out.head_tables[s, :, lo : lo + budget] = slots * heads + torch.arange(
                heads, dtype=torch.int32
            ).unsqueeze(1)
            private = batch.private_blocks[s]
            missed = int(torch.isin(residency.misses[:, 2], private).sum())
            out.misses[s] += missed
            out.hits[s] += budget * heads - missed
        out.coverage.add_(selection.coverage.mean(1))
        clock.append(time.perf_counter_ns())
        elapsed = [b - a for a, b in zip(clock, clock[1:], strict=False)]
        out.stage_ns.add_(torch.tensor(elapsed, dtype=torch.int64))
