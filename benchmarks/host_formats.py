# SPDX-License-Identifier: Apache-2.0
"""Swap-in of cold head-blocks on the CPU: pages of lower precision against byte copies.

One request selects its whole history and finds none of it, again and again; before each time,
other memory is walked through, so that pages and slots are cold. The formats take turns in one
process on one thread, and what is timed is the swap stage of the fused decode op. Other load only
adds time, and calls are shorter than a time slice: compare the least of many.

    OMP_NUM_THREADS=1 python -P benchmarks/host_formats.py --rounds 200
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import Tensor

from sentencekv_vllm.host_format import HOST_DTYPES, host_format
from sentencekv_vllm.ops.layer_ops import DecodeOutputs
from sentencekv_vllm.ops.load import load_layer_ops
from sentencekv_vllm.types import Geometry, LayerPools, SparseBatch

HEADS, GROUP, DIM = 8, 4, 128  # Llama-3.1-8B
DTYPE = torch.bfloat16


def make_pools(name: str, blocks: int, n: int) -> LayerPools:
    """`blocks` pages, and twice as many blocks: where the pages come from, and a working set."""
    form = host_format(name, n, DIM, DTYPE.itemsize)
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(2 * blocks, HEADS, n, 2 * DIM, generator=generator).to(DTYPE)
    stored = torch.zeros_like(cache[:blocks])
    if form is not None:
        stored = torch.zeros(blocks, HEADS, form.head_block_bytes, dtype=torch.uint8)

    def empty(rows: int) -> Tensor:
        return torch.full((rows, HEADS), -1, dtype=torch.int32)

    return LayerPools(
        cache=cache,
        host=stored,
        page_slot=empty(blocks),
        slot_page=empty(2 * blocks),
        slot_stamp=empty(2 * blocks),
        host_format=form,
    )


def make_batch(blocks: int, n: int, step: int) -> SparseBatch:
    """One request whose history is everything."""

    def one(value: int) -> Tensor:
        return torch.tensor([value], dtype=torch.int32)

    pages = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).int()
    return SparseBatch(
        pages=pages[None],
        num_pages=one(blocks),
        row_pages=pages[None],
        sentence_ends=torch.arange(n, blocks * n + 1, n, dtype=torch.int32)[None],
        num_sentences=one(blocks),
        history_lo=one(0),
        history_hi=one(blocks),
        budget_blocks=one(blocks),
        private_blocks=torch.arange(blocks, 2 * blocks, dtype=torch.int32)[None],
        index_kind=one(0),
        reduce=one(0),
        retention=torch.zeros(1),
        seed=one(0),
        step=step,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--context", type=int, default=2048, help="tokens")
    parser.add_argument("--block-size", type=int, default=32, help="tokens")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--flush-mib", type=int, default=128, help="walked through")
    options = parser.parse_args()
    n, blocks = options.block_size, options.context // options.block_size
    ops = load_layer_ops("cpu")
    geometry = Geometry(1, HEADS, GROUP, DIM, n, 1, DIM**-0.5)
    layers = {name: make_pools(name, blocks, n) for name in HOST_DTYPES}
    ids, offsets = torch.arange(blocks).int(), torch.arange(n * DIM).int()
    for pools in layers.values():
        ops.index_pages(pools, ids, ids, offsets)
    query = torch.randn(1, HEADS * GROUP, DIM).to(DTYPE)
    other = torch.zeros(options.flush_mib << 20, dtype=torch.uint8)
    times: dict[str, list[float]] = {name: [] for name in layers}
    for step in range(1, options.rounds + 1):
        batch = make_batch(blocks, n, step)
        for name, pools in layers.items():
            for table in (pools.page_slot, pools.slot_page, pools.slot_stamp):
                table.fill_(-1)
            out = DecodeOutputs(
                head_tables=torch.zeros(1, HEADS, blocks + 1, dtype=torch.int32),
                hits=torch.zeros(1, dtype=torch.int64),
                misses=torch.zeros(1, dtype=torch.int64),
                coverage=torch.zeros(1),
                stage_ns=torch.zeros(4, dtype=torch.int64),
            )
            other += 1
            ops.decode_layer(geometry, pools, batch, query, out)
            assert int(out.misses) == blocks * HEADS
            times[name].append(float(out.stage_ns[3]) / int(out.misses))
    kib = 2 * n * DIM * DTYPE.itemsize / 1024
    print(f"swap-in of a head-block of {kib:g} KiB, {ops.name} ops\n")
    print("| pool | bytes | ns, median | ns, least | least, to auto |\n|---|---|---|---|---|")
    least = min(times["auto"])
    for name, pools in layers.items():
        size = pools.host[0, 0].nbytes
        row = (name, size, f"{statistics.median(times[name]):.0f}", f"{min(times[name]):.0f}")
        print("|", *(f"{cell} |" for cell in row), f"{min(times[name]) / least:.2f} |")


if __name__ == "__main__":
    main()
