# SPDX-License-Identifier: Apache-2.0
"""A layer's whole decode step: rank, select, make resident, attend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_layer import BLOCK, DEVICE, Layer
from torch import Tensor

from sentencekv_vllm.ops.cuda import library
from sentencekv_vllm.ops.cuda_layer_ops import CudaOps
from sentencekv_vllm.triton_kernels.layer_ops import TritonOps
from sentencekv_vllm.triton_kernels.sparse_decode import DecodeScratch, sparse_decode
from sentencekv_vllm.triton_kernels.workspace import Workspace

MakeOps = Callable[[Workspace], TritonOps]


def implementations() -> dict[str, MakeOps]:
    """What can run here, by name."""
    made: dict[str, MakeOps] = {"Triton": TritonOps}
    if library() is not None:
        made["CUDA"] = CudaOps
    return made


class Step:
    """Binds a layer to an implementation and to the buffers that a worker would own."""

    def __init__(self, layer: Layer, make_ops: MakeOps) -> None:
        geometry, device = layer.geometry, torch.device(DEVICE)
        requests, _, width = layer.out.head_tables.shape
        self.layer = layer
        self.work = Workspace.allocate(
            geometry,
            max_requests=requests,
            max_pages=layer.context // BLOCK,
            max_sentences=layer.batch.sentence_ends.shape[1],
            max_selected=layer.working_set,
            device=device,
        )
        self.ops = make_ops(self.work)
        self.scratch = DecodeScratch.allocate(
            requests, geometry.num_query_heads, geometry.head_dim, width * BLOCK, device
        )
        self.output = torch.empty_like(layer.query)
        self.lse = torch.empty(self.output.shape[:2], device=device)
        self._step = 0

    def at_hit_rate(self, share: float) -> Callable[[], None]:
        """Bring the layer to a state in which `share` of the next selection is resident.

        Returns:
            A call that brings it back there.
        """
        for _ in range(2):  # the second with the retention of the first, as the timed ones
            self.advance()
        self.layer.keep_resident(share, self._step)
        state = self.layer.saved_state()
        self._step += 1
        self.ops.set_step(self._step)
        return lambda: self.layer.restore(state)

    def advance(self) -> None:
        self._step += 1
        self.ops.set_step(self._step)
        self.run()

    def run(self) -> None:
        """One step, as it would be captured."""
        layer = self.layer
        self.ops.begin_step(layer.batch)
        self.run_layer()

    def run_layer(self) -> None:
        """What every layer of a step does, as the worker captures it."""
        layer = self.layer
        self.ops.decode_layer(layer.geometry, layer.pools, layer.batch, layer.query, layer.out)
        self.attend()

    def attend(self) -> None:
        layer = self.layer
        keys, values = layer.pools.cache.chunk(2, dim=-1)
        sparse_decode(
            layer.query,
            keys,
            values,
            layer.out.head_tables,
            layer.seq_lens,
            layer.geometry.scale,
            self.scratch,
            self.output,
            self.lse,
        )

    def results(self) -> dict[str, Tensor]:
        """Copies of all that a step leaves behind."""
        pools, out = self.layer.pools, self.layer.out
        tensors = {
            "page_slot": pools.page_slot,
            "slot_page": pools.slot_page,
            "slot_stamp": pools.slot_stamp,
            "head_tables": out.head_tables,
            "cache": pools.cache,
            "output": self.output,
            "lse": self.lse,
        }
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def count_misses(self) -> int:
        """Misses of one more step."""
        self.layer.out.misses.zero_()
        self.run()
        return int(self.layer.out.misses.sum())
