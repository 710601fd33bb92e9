# SPDX-License-Identifier: Apache-2.0
"""The four sections of the GPU benchmark; each yields rows as it measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from gpu_clock import GIB, Bandwidth, Clock, capture
from gpu_kernels import CUDA_KERNELS, floors, kernels
from gpu_layer import BLOCK, DEVICE, Layer, Shape
from gpu_peers import DenseCache, peers
from gpu_report import Row
from gpu_step import Step, implementations
from gpu_transfers import PIECES, Transfer
from torch import Tensor

from sentencekv_vllm.triton_kernels.sparse_decode import DecodeScratch, sparse_decode

HIT_RATES = (0.0, 0.8, 0.95, 1.0)
KERNELS_HIT_RATE = 0.8
Size = tuple[Shape, int, int]  # model, tokens of context, requests


class Bench:
    """Runs sections.

    Args:
        clock: times calls.
        bandwidth: what floors are computed from.
        budget: tokens that a sparse request attends to.
        host_bytes, device_bytes: larger cases are left out, aloud.
    """

    def __init__(
        self, clock: Clock, bandwidth: Bandwidth, budget: int, host_bytes: float,
        device_bytes: float,
    ) -> None:  # fmt: skip
        self._clock, self._bandwidth, self._budget = clock, bandwidth, budget
        self._host_bytes, self._device_bytes = host_bytes, device_bytes

    def kernels(self, sizes: Sequence[Size]) -> Iterator[Row]:
        for where, layer in self._layers("kernels", sizes):
            missed = layer.budget - round(KERNELS_HIT_RATE * layer.budget)
            floor = floors(layer, missed)
            for name, make_ops in implementations().items():
                step = Step(layer, make_ops)
                restore = step.at_hit_rate(KERNELS_HIT_RATE)
                step.run()
                for case, call in kernels(step).items():
                    if name == "Triton" or case in CUDA_KERNELS:
                        timing = self._clock.time(call, restore)
                        yield Row.of(where, case, name, timing,
                                     floor[case].seconds(self._bandwidth))  # fmt: skip

    def step(self, sizes: Sequence[Size]) -> Iterator[Row]:
        for where, layer in self._layers("step", sizes):
            for share in HIT_RATES:
                missed = layer.budget - round(share * layer.budget)
                parts = floors(layer, missed)
                floor = sum(
                    parts[case].seconds(self._bandwidth)
                    for case in ("score_blocks", "swap_in", "sparse_decode")
                )
                for name, make_ops in implementations().items():
                    step = Step(layer, make_ops)
                    restore = step.at_hit_rate(share)
                    misses = step.count_misses()
                    expected = missed * layer.requests * layer.geometry.num_kv_heads
                    assert misses == expected, f"{misses} misses where {expected} were set up"
                    timing = self._clock.time(step.run, restore)
                    yield Row.of(where, f"hit rate {share}", name, timing, floor)
            for name, make_ops in implementations().items():
                step = Step(layer, make_ops)
                restore = step.at_hit_rate(1.0)
                for case, call in (
                    ("host, launched", step.run_layer),
                    ("host, replayed", capture(step.run_layer, restore).replay),
                ):
                    restore()
                    yield Row.of(where, case, name, self._clock.host(call), 0.0)

    def gather(self, sizes: Sequence[Size]) -> Iterator[Row]:
        where = ("gather", "", 0, 0)
        for piece_bytes in PIECES:
            transfer = Transfer(piece_bytes)
            for case, name, call, replayed in transfer.calls():
                rate = self._bandwidth.to_host if case == "offload" else self._bandwidth.to_gpu
                timing = self._clock.time(call, replay=replayed)
                yield Row.of(where, f"{case} {piece_bytes} B", name, timing,
                             transfer.total_bytes / rate)  # fmt: skip

    def attention(self, sizes: Sequence[Size]) -> Iterator[Row]:
        for shape, context, requests in sizes:
            where = ("attention", shape.name, context, requests)
            num_bytes = 4 * requests * context * shape.num_kv_heads * shape.head_dim
            if 3 * num_bytes > self._device_bytes:
                print(f"attention {where[1:]} left out: needs {3 * num_bytes / GIB:.0f} GiB")
                continue
            cache = _dense_cache(shape, context, requests)
            ours = _ours(cache, context)
            expected = ours()
            floor = num_bytes / self._bandwidth.memory
            for name, peer in peers(cache):
                reason = peer if isinstance(peer, str) else ""
                if not isinstance(peer, str):
                    try:
                        torch.testing.assert_close(peer(), expected, rtol=2e-2, atol=2e-2)
                        timing = self._clock.time(peer)
                        yield Row.of(where, "whole context", name, timing, floor)
                    except (AssertionError, RuntimeError) as error:
                        reason = str(error)
                if reason:
                    print(f"attention {where[1:]} without {name}: {reason}")
            yield Row.of(where, "whole context", "ours", self._clock.time(ours), floor)
            sparse = _ours(cache, self._budget)
            yield Row.of(where, f"{self._budget} tokens", "ours", self._clock.time(sparse),
                         floor * self._budget / context)  # fmt: skip

    def _layers(
        self, section: str, sizes: Sequence[Size]
    ) -> Iterator[tuple[tuple[str, str, int, int], Layer]]:
        for shape, context, requests in sizes:
            num_bytes = 4 * requests * context * shape.num_kv_heads * shape.head_dim
            where = (section, shape.name, context, requests)
            if num_bytes > self._host_bytes:
                print(f"{section} {where[1:]} left out: its swap pool takes "
                      f"{num_bytes / GIB:.0f} GiB; raise --host-gib")  # fmt: skip
                continue
            yield where, Layer(shape, context, requests, self._budget)


def _dense_cache(shape: Shape, context: int, requests: int) -> DenseCache:
    generator = torch.Generator(DEVICE).manual_seed(context + requests)

    def normal(*size: int) -> Tensor:
        empty = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
        return empty.normal_(generator=generator)

    heads, dim = shape.num_kv_heads, shape.head_dim
    return DenseCache(
        query=normal(requests, shape.num_query_heads, dim),
        keys=normal(requests, context, heads, dim),
        values=normal(requests, context, heads, dim),
        lengths=torch.full((requests,), context, dtype=torch.int32, device=DEVICE),
        scale=dim**-0.5,
    )


def _ours(cache: DenseCache, tokens: int) -> Callable[[], Tensor]:
    """Attention over the first `tokens` of every request, copied to head-major blocks."""
    requests, num_query_heads, dim = cache.query.shape
    heads, device = cache.keys.shape[2], cache.query.device
    blocks = torch.cat(
        [
            x[:, :tokens].unflatten(1, (-1, BLOCK)).flatten(0, 1).transpose(1, 2)
            for x in (cache.keys, cache.values)
        ],
        dim=-1,
    )
    keys, values = blocks.chunk(2, dim=-1)
    ids = torch.arange(len(blocks), dtype=torch.int32, device=device).view(requests, 1, -1)
    head = torch.arange(heads, dtype=torch.int32, device=device)[:, None]
    tables = ids * heads + head
    lengths = torch.full_like(cache.lengths, tokens)
    scratch = DecodeScratch.allocate(requests, num_query_heads, dim, tokens, device)
    output = torch.empty_like(cache.query)
    lse = torch.empty(output.shape[:2], device=device)

    def call() -> Tensor:
        sparse_decode(cache.query, keys, values, tables, lengths, cache.scale, scratch, output, lse)
        return output

    return call
