# SPDX-License-Identifier: Apache-2.0
"""The three calls a worker makes per layer on a GPU: Triton, with CUDA where data moves, where
tensor cores count bits and where one block of threads does what would be many launches."""

from __future__ import annotations

import torch
from torch import Tensor

from ..triton_kernels.layer_ops import TritonOps
from ..triton_kernels.quantize_query import quantize_query
from ..triton_kernels.score_summaries import score_summaries
from ..triton_kernels.score_tokens import score_tokens
from ..triton_kernels.workspace import Workspace
from ..types import Geometry, LayerPools, SparseBatch
from . import custom_ops as custom_ops  # registers torch.ops.sentencekv
from .cuda import MAX_CHANNELS, MAX_GROUP, QUANTIZED_DIMS, library
from .layer_ops import DecodeOutputs


class CudaOps(TritonOps):  # type: ignore[misc]  # mypy does not follow the mapped package
    """`TritonOps` with ranking, residency and swap-in by the kernels of `csrc/`.

    Raises:
        RuntimeError: at the first step, where the kernels could not be built.
    """

    name = "cuda"

    def __init__(self, workspace: Workspace) -> None:
        super().__init__(workspace)
        self._misses = workspace.misses.view(*workspace.blocks.shape, 3)
        self._miss_counts = torch.empty_like(workspace.coverage, dtype=torch.int32)

    def decode_layer(
        self,
        geometry: Geometry,
        pools: LayerPools,
        batch: SparseBatch,
        query: Tensor,
        rotation: Tensor,
        out: DecodeOutputs,
    ) -> None:
        if geometry.group_size > MAX_GROUP:
            super().decode_layer(geometry, pools, batch, query, rotation, out)
            return
        self.score(geometry, pools, batch, query, rotation)
        self.select_and_swap_in(geometry, pools, batch, out)

    def score(
        self,
        geometry: Geometry,
        pools: LayerPools,
        batch: SparseBatch,
        query: Tensor,
        rotation: Tensor | None = None,
    ) -> None:
        """Logits of all sentences, to `best` of the workspace.

        Args:
            rotation: of the query, which is quantised first; None: the workspace holds its levels.
        """
        work = self._work
        fits = pools.scales.dtype.itemsize == 2 and geometry.index_dim <= MAX_CHANNELS
        rotates = fits and geometry.index_dim == geometry.head_dim in QUANTIZED_DIMS
        if rotation is not None and not rotates:
            quantize_query(query, rotation, work.levels, work.steps)
            rotation = None
        if fits:
            torch.ops.sentencekv.score_tokens(
                pools.bits,
                pools.scales,
                None if rotation is None else query,
                rotation,
                work.levels,
                work.steps,
                batch.pages,
                batch.num_pages,
                batch.sentence_ends,
                batch.num_sentences,
                work.first,
                batch.history_lo,
                batch.history_hi,
                batch.index_kind,
                batch.reduce,
                batch.byte_rows,
                work.best,
                work.partial,
                geometry.scale,
            )
        else:
            score_tokens(geometry, pools, batch, work)
        if not batch.token_bits_only:
            score_summaries(geometry, pools, batch, query, work)

    def rank(self, geometry: Geometry, pools: LayerPools, batch: SparseBatch) -> None:
        """From the logits to the selected blocks."""
        torch.ops.sentencekv.rank_sentences(*self._rank_arguments(geometry, pools, batch))

    def select_and_swap_in(
        self, geometry: Geometry, pools: LayerPools, batch: SparseBatch, out: DecodeOutputs
    ) -> None:
        """`rank` and `reuse_selection` in one launch."""
        torch.ops.sentencekv.decode_selection(
            *self._rank_arguments(geometry, pools, batch),
            batch.pages,
            batch.private_blocks,
            pools.page_slot,
            pools.slot_page,
            pools.slot_stamp,
            out.head_tables,
            self._misses,
            self._miss_counts,
            out.hits,
            out.misses,
            out.coverage,
            pools.host,
            pools.cache,
        )

    def _rank_arguments(
        self, geometry: Geometry, pools: LayerPools, batch: SparseBatch
    ) -> tuple[Tensor | int, ...]:
        work = self._work
        return (
            work.best,
            work.partial,
            batch.row_pages,
            pools.kept,
            batch.num_pages,
            batch.sentence_ends,
            batch.num_sentences,
            work.first,
            batch.history_lo,
            batch.history_hi,
            batch.budget_blocks,
            batch.index_kind,
            batch.reduce,
            batch.retention,
            batch.seed,
            work.step,
            work.scores,
            work.mass,
            work.blocks,
            work.coverage,
            geometry.block_size,
            geometry.rows_per_page,
            batch.pages.shape[1],
        )

    def resolve_residency(self, pools: LayerPools, batch: SparseBatch, out: DecodeOutputs) -> None:
        work = self._work
        torch.ops.sentencekv.resolve_residency(
            work.blocks,
            work.coverage,
            batch.pages,
            batch.private_blocks,
            batch.budget_blocks,
            batch.history_lo,
            work.step,
            pools.page_slot,
            pools.slot_page,
            pools.slot_stamp,
            out.head_tables,
            self._misses,
            self._miss_counts,
            out.hits,
            out.misses,
            out.coverage,
        )

    def swap_in(self, pools: LayerPools, batch: SparseBatch) -> None:
        requests = len(batch.budget_blocks)
        torch.ops.sentencekv.gather_misses(
            pools.host, pools.cache, self._misses, self._miss_counts[:requests]
        )


def gpu_layer_ops(workspace: Workspace, quantized_pages: bool) -> TritonOps:
    """`CudaOps` where the kernels are built or can be, else `TritonOps` (the log says why).

    Args:
        quantized_pages: of the swap pool; the CUDA gather copies bytes, Triton's restores them.
    """
    if quantized_pages or library() is None:
        return TritonOps(workspace)
    return CudaOps(workspace)
