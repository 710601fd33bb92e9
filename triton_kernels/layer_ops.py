# SPDX-License-Identifier: Apache-2.0
"""The calls a worker makes per layer, over the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from ..ops.estimate_unselected import Attended, estimate_unselected
from ..ops.layer_ops import DecodeOutputs
from ..types import Geometry, IndexKind, LayerPools, SparseBatch
from .index_pages import index_pages
from .index_sentences import index_sentences
from .locate_sentences import locate_sentences
from .quantize_query import quantize_query
from .rank_blocks import rank_blocks
from .resolve_residency import resolve_residency
from .score_blocks import score_blocks
from .score_sentences import score_sentences
from .select_blocks import select_blocks
from .swap_blocks import swap_in
from .workspace import Workspace


class TritonOps:
    """`LayerOps` for CUDA: fixed grids, no host read and no allocation in `decode_layer`.

    Where it differs from the reference: `key_offset` is ignored, since CUDA blocks hold
    plain rows; `private_blocks` has room for every budget of the batch; requests share
    neither pages nor private blocks; `stage_ns` is left alone, since a host clock says
    nothing about kernels in a queue (profile by kernel name instead).

    `begin_step` and `decode_layer` may be recorded in CUDA graphs: before a replay the caller
    updates the tensors of the batch in place and calls `set_step`, which is not recorded.
    """

    name = "triton"

    def __init__(self, workspace: Workspace) -> None:
        self._work = workspace

    def set_step(self, step: int) -> None:
        self._work.step.fill_(step)

    def begin_step(self, batch: SparseBatch) -> None:
        if not batch.token_codes_only:
            locate_sentences(batch, self._work.first)

    def index_pages(
        self,
        pools: LayerPools,
        block_ids: Tensor,
        page_ids: Tensor,
        key_offset: Tensor,
    ) -> None:
        index_pages(pools, block_ids, page_ids)

    def index_sentences(
        self,
        pools: LayerPools,
        rows: Tensor,
        spans: Tensor,
        span_blocks: Tensor,
        key_offset: Tensor,
        kind: IndexKind = IndexKind.CENTROID,
    ) -> None:
        index_sentences(pools, rows, spans, span_blocks, kind)

    def decode_layer(
        self,
        geometry: Geometry,
        pools: LayerPools,
        batch: SparseBatch,
        query: Tensor,
        out: DecodeOutputs,
    ) -> None:
        self.select(geometry, pools, batch, query)
        self.reuse_selection(pools, batch, out)

    def select(
        self, geometry: Geometry, pools: LayerPools, batch: SparseBatch, query: Tensor
    ) -> None:
        """From the query to the selected blocks: each kernel takes the rows of its kinds."""
        if pools.basis is not None:
            quantize_query(geometry, pools.basis, query, self._work)
            score_blocks(geometry, pools, batch, self._work)
            rank_blocks(geometry, pools, batch, self._work)
        if not batch.token_codes_only:
            score_sentences(geometry, pools, batch, query, self._work)
            select_blocks(geometry, pools, batch, self._work)

    def reuse_selection(self, pools: LayerPools, batch: SparseBatch, out: DecodeOutputs) -> None:
        """What `decode_layer` does once blocks are selected, which the workspace holds."""
        self.resolve_residency(pools, batch, out)
        self.swap_in(pools, batch)

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
        """The reference: PyTorch on tensors of fixed shapes, no kernel of its own."""
        step = self._work.step
        estimate_unselected(geometry, pools, batch, step, estimates, query, attended, output)

    def resolve_residency(self, pools: LayerPools, batch: SparseBatch, out: DecodeOutputs) -> None:
        """Give every head-block of the selection a slot; `CudaOps` has its own."""
        self._work.num_misses.zero_()
        resolve_residency(pools, batch, self._work, out)

    def swap_in(self, pools: LayerPools, batch: SparseBatch) -> None:
        """Copy what `resolve_residency` found missing; `CudaOps` has its own."""
        swap_in(pools, self._work.misses, self._work.num_misses)
