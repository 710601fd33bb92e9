# SPDX-License-Identifier: Apache-2.0
"""Which variants of the Triton kernels start-up compiles, and which ones serving launches.

Run as `python -P tests/worker/launch_keys.py CUDA 2 64 auto` (ops, vectors a sentence, bits of a
token's code, host_kv_dtype) without TRITON_INTERPRET: a worker of two layers
lives through crowds of requests. Nothing is compiled and no kernel runs; the keys under which
Triton would keep the kernels are printed, as one JSON object. A process of its own, since Triton is
either compiled or interpreted throughout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from sentencekv_vllm.host_format import host_format
from sentencekv_vllm.messages import DecodeOptions, RequestUpdate, SparseRows, StepMessage
from sentencekv_vllm.ops.cuda_layer_ops import CudaOps
from sentencekv_vllm.ops.custom_ops import SCHEMAS
from sentencekv_vllm.ops.load import Sizes
from sentencekv_vllm.ops.token_layout import TokenLayout
from sentencekv_vllm.triton_kernels.layer_ops import TritonOps
from sentencekv_vllm.triton_kernels.sparse_decode import DecodeScratch, sparse_decode
from sentencekv_vllm.triton_kernels.workspace import Workspace
from sentencekv_vllm.types import Geometry, IndexKind, QueryKind, Reduce
from sentencekv_vllm.worker import pools, runtime, tables, transfer, warm_start
from sentencekv_vllm.worker.plan import StepPlan
from sentencekv_vllm.worker.prefetch import Prefetch
from sentencekv_vllm.worker.runtime import Runtime
from sentencekv_vllm.worker.warm_up import warm_up

N, D, GROUP, LAYERS, SLOTS, WORKING_SET = 16, 64, 4, 2, 11, 24
PAGES, BLOCKS, LONGEST = 701, 301, 600  # of the swap pool, of the cache, of a request
CPU = torch.device("cpu")

Key = tuple[str, str]  # kernel, and all that a variant is compiled for


class Absent:
    """A driver for a GPU that is not here."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class NoStreams:
    """`torch.cuda` for `Prefetch`, where all is done in order."""

    class Stream(SimpleNamespace):
        def __init__(self, device: Any = None) -> None:
            super().__init__()

        def wait_stream(self, other: Any) -> None: ...

        def wait_event(self, event: Any) -> None: ...

    class Event(SimpleNamespace):
        def record(self, stream: Any) -> None: ...

    def current_stream(self, device: Any) -> Stream:
        return self.Stream()

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield


def record_launches() -> dict[Key, None]:
    """From now on a launch leaves its key in what is returned, in order, and does nothing else."""
    keys: dict[Key, None] = {}

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kwargs["debug"] = False
        binder = self.device_caches[0][-1]
        bound, specialization, options = binder(*args, **kwargs)
        named = dict(zip(bound, specialization, strict=True))
        keys[self.__name__, f"{named} {options}"] = None

    JITFunction.run = run
    driver.set_active(Absent())
    for module in (pools, runtime, tables, warm_start):  # aligned as on a GPU, in one buffer
        module.upload = lambda arrays, device: transfer.upload_packed(
            [torch.from_numpy(np.asarray(a)) for a in arrays], device
        )
    for name in SCHEMAS:
        CUDA_KERNELS.impl(name, lambda *_: None, "CPU")
    return keys


CUDA_KERNELS = torch.library.Library("sentencekv", "IMPL")


def make_runtime(
    ops: type[TritonOps], heads: int, vectors: int, width: int, host_dtype: str
) -> Runtime:
    form = host_format(host_dtype, N, D, 2)
    geometry = Geometry(LAYERS, heads, GROUP, D, N, 3, D**-0.5, vectors, width, form)
    sizes = Sizes(geometry, CPU, SLOTS, LONGEST, 4000, WORKING_SET)

    def workspace(requests: int) -> Workspace:
        limits = (requests, sizes.max_pages, sizes.max_sentences, sizes.max_selected, CPU)
        return Workspace.allocate(geometry, *limits)

    caches = [torch.zeros(BLOCKS, heads, N, 2 * D, dtype=torch.bfloat16) for _ in range(LAYERS)]
    return Runtime(
        geometry,
        caches,
        TokenLayout.rows(N, D, CPU),
        num_pages=PAGES,
        num_slots=SLOTS,
        working_set_blocks=WORKING_SET,
        ops=ops(workspace(SLOTS)),
        layer_names=[str(i) for i in range(LAYERS)],
        observation_window=1,
        sizes=sizes,
        prefetch=Prefetch(CPU, LAYERS, streams=NoStreams()),
        warm_ops=ops(workspace(8)),
    )


def attend(worker: Runtime, layer: int, plan: StepPlan, query: torch.Tensor) -> None:
    """Rank and attend, as vllm_glue/cuda.py does on a plan's buffers."""
    geometry, cache = worker.geometry, worker.pools.layers[layer].cache
    rows, heads, width = plan.out.head_tables.shape
    padded = query.new_zeros(rows, *query.shape[1:])
    padded[: len(query)] = query
    worker.await_layer(plan, layer)
    found = worker.rank(plan, layer, padded)
    keys, values = cache.chunk(2, dim=-1)
    scratch = DecodeScratch.allocate(rows, geometry.num_query_heads, D, width * N, CPU)
    output, lse = torch.empty_like(padded), torch.empty(padded.shape[:2])
    sparse_decode(padded, keys, values, found, plan.seq_lens, geometry.scale, scratch, output, lse)


class Request:
    """Blocks, pages and sentences of any content."""

    def __init__(self, slot: int, blocks: int, kind: IndexKind, query_kind: QueryKind) -> None:
        self.slot, self.length, self.copied = slot, blocks * N - 3, 0
        self.options = DecodeOptions(
            index_kind=int(kind),
            reduce=int(Reduce.SOFTMAX_MEAN),
            retention=1.0,
            query_kind=int(query_kind),
            budget_blocks=1 + slot,
            seed=slot,
        )

    def update(self, sentence_tokens: int) -> RequestUpdate | None:
        full = self.length // N - 1
        if full == self.copied:
            return None
        new, first = range(self.copied, full), not self.copied
        start = self.copied * N + 1
        self.copied = full
        return RequestUpdate(
            self.slot,
            self.options if first else None,
            [i % BLOCKS for i in new],
            [i % PAGES for i in new],
            [i % PAGES for i in new for _ in range(2)],  # sentences are shorter than planned
            np.arange(start, full * N + 1, sentence_tokens, dtype=np.int32),
            [1 + i for i in range(WORKING_SET)] if first else None,
            last_query=0,
        )


def serve(worker: Runtime, kinds: list[IndexKind]) -> None:
    """Requests of all lengths, kinds and numbers, and some steps of each crowd."""
    step, heads = 1000, worker.geometry.num_query_heads
    crowds = [(1, 30), (1, 590), (2, 70), (3, 140), (5, 300), (11, 40), (8, 520)]
    query_kinds = list(QueryKind)
    for crowd, (size, blocks) in enumerate(crowds):
        for mixed in (False, True):
            requests = [
                Request(
                    slot,
                    blocks + 3 * slot,
                    kinds[(slot + crowd) % len(kinds)] if mixed else kinds[crowd % len(kinds)],
                    query_kinds[(slot + crowd) % 3 if mixed else crowd % 3],
                )
                for slot in range(size)
            ]
            dropped = [*range(SLOTS)]
            for _ in range(18):  # a block becomes full once in sixteen
                restarts = np.asarray([not r.copied for r in requests])
                for request in requests:
                    request.length += 1
                updates = [u for r in requests if (u := r.update(3 + 5 * crowd)) is not None]
                columns = ([r.slot for r in requests], [r.length // N for r in requests],
                           [1] * size, [r.copied for r in requests],
                           [r.length for r in requests])  # fmt: skip
                arrays = [np.asarray(column, np.int32) for column in columns]
                names = [str(r.slot) for r in requests]
                rows = SparseRows(*arrays, restarts, names)
                worker.apply(StepMessage(step, dropped, updates, rows, frees=True))
                step, dropped = step + 1, []
                worker.set_batch_order(names)
                table = torch.zeros(size, LONGEST, dtype=torch.int32)
                (plan,) = worker.plan(table, torch.empty(0), torch.arange(size))
                query = torch.zeros(size, heads, D, dtype=torch.bfloat16)
                for layer in range(LAYERS):
                    attend(worker, layer, plan, query)
                worker.end_step()


def main() -> None:
    ops = {"CUDA": CudaOps, "Triton": TritonOps}[sys.argv[1]]
    vectors, width = map(int, sys.argv[2:4])
    kinds = [kind for kind in IndexKind if kind.vectors <= vectors]
    if not width:
        kinds.remove(IndexKind.TOKEN_CODES)
    keys = record_launches()
    result: dict[str, list[Key]] = {"compiled": [], "late": []}
    for heads in (1, 3):  # few: the tables of a layer begin where those of the one before end
        keys.clear()
        worker = make_runtime(ops, heads, vectors, width, sys.argv[4])
        warm_up(worker, lambda plan, query, worker=worker: attend(worker, 0, plan, query))
        compiled = list(keys)
        serve(worker, kinds)
        result["compiled"] += compiled
        result["late"] += list(keys)[len(compiled) :]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
