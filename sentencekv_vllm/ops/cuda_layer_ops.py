# SPDX-License-Identifier: Apache-2.0
"""The calls a worker makes per layer on a GPU: Triton, with CUDA where data moves, where
tensor cores count bits and where one block of threads does what would be many launches."""

from __future__ import annotations

import torch
from torch import Tensor

from ..triton_kernels.layer_ops import TritonOps
from ..triton_kernels.quantize_query import quantize_query
from ..triton_kernels.score_blocks import score_blocks
from ..triton_kernels.score_summaries import score_summaries
from ..triton_kernels.workspace import Workspace
from ..types import Basis, Geometry, LayerPools, SparseBatch
from . import custom_ops as custom_ops  # registers torch.ops.sentencekv
from .cuda import MAX_BLOCKS, MAX_GROUP, MAX_PLANES, library
from .layer_ops import DecodeOutputs
from .score_blocks import unit_factor


class CudaOps(TritonOps):  # type: ignore[misc]  # mypy does not follow the mapped package
    """`TritonOps` with scoring, ranking, residency and swap-in by the kernels of `csrc/`.

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
        out: DecodeOutputs,
    ) -> None:
        if geometry.group_size > MAX_GROUP or batch.pages.shape[1] > MAX_BLOCKS:
            super().decode_layer(geometry, pools, batch, query, out)
            return
        self.score(geometry, pools, batch, query)
        self.select_and_swap_in(geometry, pools, batch, out)

    def score(
        self, geometry: Geometry, pools: LayerPools, batch: SparseBatch, query: Tensor
    ) -> None:
        """Masses of all blocks, and logits of all sentences, to the workspace."""
        if pools.basis is not None:
            if geometry.code_width <= MAX_PLANES:
                self.quantize_query(pools.basis, batch, query)
                self.score_blocks(geometry, pools, batch)
            else:
                quantize_query(geometry, pools.basis, query, self._work)
                score_blocks(geometry, pools, batch, self._work)
        if not batch.token_codes_only and pools.centroids is not None:
            score_summaries(geometry, pools, batch, query, self._work)

    def quantize_query(self, basis: Basis, batch: SparseBatch, query: Tensor) -> None:
        """Levels and steps of the queries of TOKEN_CODES requests."""
        work = self._work
        torch.ops.sentencekv.quantize_query(
            query,
            basis.query_map,
            batch.index_kind,
            work.levels,
            work.steps,
            work.mean_levels,
            work.mean_steps,
            basis.bits,
        )

    def score_blocks(self, geometry: Geometry, pools: LayerPools, batch: SparseBatch) -> None:
        """Tops and sums, from what `quantize_query` left."""
        work = self._work
        torch.ops.sentencekv.score_blocks(
            pools.codes,
            pools.scales,
            pools.means,
            pools.mean_scales,
            work.levels,
            work.steps,
            work.mean_levels,
            work.mean_steps,
            batch.pages,
            batch.num_pages,
            batch.index_kind,
            work.tops,
            work.sums,
            unit_factor(geometry.scale),
        )

    def rank(self, geometry: Geometry, pools: LayerPools, batch: SparseBatch) -> None:
        """From masses and logits to the selected blocks."""
        torch.ops.sentencekv.rank(*self._rank_arguments(geometry, pools, batch))

    def select_and_swap_in(
        self, geometry: Geometry, pools: LayerPools, batch: SparseBatch, out: DecodeOutputs
    ) -> None:
        """`rank` and `reuse_selection` in one launch."""
        torch.ops.sentencekv.decode_selection(
            *self._rank_arguments(geometry, pools, batch),
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
    ) -> tuple[Tensor | int | None, ...]:
        work = self._work
        return (
            work.tops,
            work.sums,
            batch.pages,
            pools.page_kept,
            work.best,
            batch.row_pages,
            pools.kept,
            batch.sentence_ends,
            batch.num_sentences,
            work.first,
            batch.reduce,
            batch.seed,
            work.step,
            work.scores,
            work.mass,
            batch.num_pages,
            batch.history_lo,
            batch.history_hi,
            batch.budget_blocks,
            batch.index_kind,
            batch.retention,
            work.blocks,
            work.coverage,
            geometry.block_size,
            geometry.rows_per_page,
            geometry.group_size,
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
