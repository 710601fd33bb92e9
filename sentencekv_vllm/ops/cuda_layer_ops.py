# SPDX-License-Identifier: Apache-2.0
"""The three calls a worker makes per layer on a GPU: Triton, with CUDA where data moves."""

from __future__ import annotations

import torch

from ..triton_kernels.layer_ops import TritonOps
from ..triton_kernels.workspace import Workspace
from ..types import LayerPools, SparseBatch
from . import custom_ops as custom_ops  # registers torch.ops.sentencekv
from .cuda import library
from .layer_ops import DecodeOutputs


class CudaOps(TritonOps):  # type: ignore[misc]  # mypy does not follow the mapped package
    """`TritonOps` with residency and swap-in by the kernels of `csrc/`.

    Raises:
        RuntimeError: at the first step, where the kernels could not be built.
    """

    name = "cuda"

    def __init__(self, workspace: Workspace) -> None:
        super().__init__(workspace)
        self._misses = workspace.misses.view(*workspace.blocks.shape, 3)
        self._miss_counts = torch.empty_like(workspace.coverage, dtype=torch.int32)

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
