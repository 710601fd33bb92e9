# SPDX-License-Identifier: Apache-2.0
"""Decode attention of a layer on the CPU: vLLM's op over the full table against ours.

Ours counts everything a layer does: score, select, resolve, swap in, and vLLM's own op over the
short per-head tables. Both sides run in this process on one thread, whose CPU time is taken: other
processes disturb it less. What a model does once per step (metadata, the fixed part of tables) is
on neither side. The working set is warm: twice the history part of the budget, filled by the
steps before.

With one layer, our index and working set may stay in the CPU's caches. With eight layers in
turn they do not, as in a model: what is read comes from memory, on both sides.

Keys and values are Gaussian. The query of every head walks at random: `drift` is the share of
its variance that is new at each step, 0 for a fixed query.

    python -P benchmarks/decode_attention.py --context 8192 32768 --block-size 32 128
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from vllm import _custom_ops as vllm_ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from sentencekv_vllm.ops.basis import plain_basis
from sentencekv_vllm.ops.layer_ops import DecodeOutputs, LayerOps
from sentencekv_vllm.ops.load import load_layer_ops
from sentencekv_vllm.types import Geometry, IndexKind, LayerPools, Reduce, SparseBatch

HEADS, GROUP, DIM = 8, 4, 128  # Llama-3.1-8B
DTYPE = torch.bfloat16
SINKS, RECENT, BUDGET = 32, 128, 512  # tokens
SENTENCE = 28  # tokens, mean
SHARPNESS = 2.0  # standard deviation of the logits
WARM_UP = 4  # steps


@dataclass(frozen=True)
class Reading:
    """How much of the index is read."""

    code_width: int = DIM  # bits of a token's code: two of half of the channels
    layer_share: int = 1  # layers for one that ranks


@dataclass(frozen=True)
class Setting:
    context: int  # tokens
    block_size: int
    num_layers: int
    kind: IndexKind
    reduce: Reduce
    retention: float
    drift: float
    reading: Reading


@dataclass(frozen=True)
class Result:
    """Milliseconds per layer; those of the stages are medians."""

    setting: Setting
    stock_median: float
    stock_min: float
    ours_median: float
    ours_min: float
    score: float
    select: float
    resolve: float
    swap: float
    attend: float
    hit_rate: float
    index: float  # copying one layer's context out and indexing it, once per request

    @property
    def ratio(self) -> float:
        return self.stock_median / self.ours_median

    @property
    def ratio_of_minima(self) -> float:
        """What remains of the ratio when other load only ever adds time."""
        return self.stock_min / self.ours_min


@dataclass(frozen=True)
class Layers:
    """One request of `context` tokens, offloaded and indexed in every layer."""

    geometry: Geometry
    pools: list[LayerPools]
    batch: SparseBatch
    table: Tensor  # [1, context / N] int32: the request's blocks before they were offloaded
    short_tables: list[Tensor]  # [1, H, W] int32 per layer; the history part is written by ours
    index_ms: float  # copy-out and index of one layer


def attention_op(
    query: Tensor, cache: Tensor, seq_len: int
) -> Callable[[Tensor, Tensor, Tensor], None]:
    """vLLM's op for one query token a row: run(query, cache, tables)."""
    rows, query_heads, _ = query.shape
    heads, n = cache.shape[1], cache.shape[2]
    isa = _get_attn_isa(DTYPE, n, DIM, "auto")
    seq_lens = torch.full((rows,), seq_len, dtype=torch.int32)
    starts = torch.arange(rows + 1, dtype=torch.int32)
    output = torch.empty_like(query)
    metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
        rows, query_heads, heads, DIM, seq_lens, DTYPE, starts, True, -1, isa, True
    )

    def run(query: Tensor, cache: Tensor, tables: Tensor) -> None:
        keys, values = cache.view(len(cache), heads, 2 * n, DIM).chunk(2, dim=2)
        vllm_ops.cpu_attention_with_kv_cache(
            query,
            keys,
            values,
            output,
            starts,
            seq_lens,
            DIM**-0.5,
            True,
            None,
            -1,
            tables,
            0,
            metadata,
            None,
        )

    return run


def make_layers(
    ops: LayerOps, context: int, n: int, num_layers: int, reading: Reading, seed: int = 0
) -> Layers:
    generator = torch.Generator().manual_seed(seed)
    blocks = context // n
    sinks, recent = -(-SINKS // n), -(-RECENT // n)
    budget = BUDGET // n - sinks - recent
    working_set = 2 * budget
    rows_per_page = -(-n // 16)
    geometry = Geometry(
        num_layers,
        HEADS,
        GROUP,
        DIM,
        n,
        rows_per_page,
        DIM**-0.5,
        code_width=reading.code_width,
    )
    lengths = torch.randint(SENTENCE - 20, SENTENCE + 21, (context,), generator=generator)
    ends = lengths.cumsum(0)
    ends = torch.cat((ends[ends < context], torch.tensor([context]))).int()

    def count(value: int) -> Tensor:
        return torch.tensor([value], dtype=torch.int32)

    order = torch.randperm(blocks + working_set, generator=generator).int() + 1
    batch = SparseBatch(
        pages=torch.randperm(blocks, generator=generator).int()[None],
        num_pages=count(blocks),
        row_pages=torch.randperm(blocks, generator=generator).int()[None],
        sentence_ends=ends[None],
        num_sentences=count(len(ends)),
        history_lo=count(sinks),
        history_hi=count(blocks - recent),
        budget_blocks=count(budget),
        private_blocks=order[None, blocks:].contiguous(),
        index_kind=count(0),
        reduce=count(0),
        retention=torch.zeros(1),
        seed=count(0),
        step=0,
    )
    table = order[None, :blocks].contiguous()
    content = torch.randn(blocks + working_set + 1, HEADS, n, 2 * DIM, generator=generator)
    content = content.to(DTYPE)
    ends_before = torch.cat((count(0), ends[:-1]))
    columns = (ends_before // n)[:, None] + torch.arange(2 + (SENTENCE + 20) // n)
    i = torch.arange(len(ends))
    rows = batch.row_pages[0].long()[i // rows_per_page] * rows_per_page + i % rows_per_page
    spans = torch.stack((ends_before % n, ends - ends_before), 1)
    span_blocks = table[0, columns.clamp(max=blocks - 1).long()]
    key_offset = torch.arange(n * DIM, dtype=torch.int32)
    pools, index_ms = [], []
    for layer in range(num_layers):
        pool = empty_pools(content.roll(layer, 0), blocks, rows_per_page, geometry.code_width)
        start = time.perf_counter()
        ops.index_pages(pool, table[0], batch.pages[0], key_offset)
        ops.index_sentences(pool, rows.int(), spans, span_blocks, key_offset)
        index_ms.append(1e3 * (time.perf_counter() - start))
        pools.append(pool)
    ids = torch.cat((table[0, :sinks], torch.zeros(budget, dtype=torch.int32), table[0, -recent:]))
    short = (ids * HEADS + torch.arange(HEADS, dtype=torch.int32)[:, None])[None].contiguous()
    return Layers(geometry, pools, batch, table, [short.clone() for _ in pools], min(index_ms))


def empty_pools(cache: Tensor, pages: int, rows_per_page: int, code_width: int) -> LayerPools:
    n = cache.shape[2]
    return LayerPools(
        cache=cache,
        host=torch.zeros(pages, *cache.shape[1:], dtype=DTYPE),
        codes=torch.zeros(pages, HEADS, code_width // 8, n, dtype=torch.uint8),
        scales=torch.zeros(pages, HEADS, n, dtype=torch.bfloat16),
        means=torch.zeros(pages, HEADS, DIM, dtype=torch.int8),
        mean_scales=torch.zeros(pages, HEADS),
        page_kept=torch.zeros(pages, HEADS, dtype=torch.uint8),
        # Of two bits; which basis it is changes no time.
        basis=replace(plain_basis(HEADS, DIM, code_width), bits=2),
        centroids=torch.zeros(pages * rows_per_page, HEADS, DIM, dtype=torch.bfloat16),
        kept=torch.zeros(pages * rows_per_page, HEADS, dtype=torch.uint8),
        page_slot=torch.full((pages, HEADS), -1, dtype=torch.int32),
        slot_page=torch.full((len(cache), HEADS), -1, dtype=torch.int32),
        slot_stamp=torch.full((len(cache), HEADS), -1, dtype=torch.int32),
    )


def time_stock(layers: Layers, steps: int) -> list[float]:
    """Milliseconds of every call of vLLM's op over the full table."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, HEADS * GROUP, DIM, generator=generator).to(DTYPE)
    context = layers.table.shape[1] * layers.geometry.block_size
    run = attention_op(query, layers.pools[0].cache, context)
    times = []
    for _ in range(steps):
        for pools in layers.pools:
            start = time.thread_time_ns()
            run(query, pools.cache, layers.table)
            times.append((time.thread_time_ns() - start) / 1e6)
    return times[len(layers.pools) :]


def time_ours(ops: LayerOps, layers: Layers, setting: Setting, steps: int) -> tuple[Tensor, float]:
    """[calls, 6] milliseconds (stages, attention, all of the call), and the hit rate."""
    generator = torch.Generator().manual_seed(2)
    geometry, n = layers.geometry, layers.geometry.block_size
    batch = replace(
        layers.batch,
        index_kind=torch.tensor([setting.kind], dtype=torch.int32),
        reduce=torch.tensor([setting.reduce], dtype=torch.int32),
        retention=torch.tensor([setting.retention]),
    )
    outs = [
        DecodeOutputs(
            head_tables=tables,
            hits=torch.zeros(1, dtype=torch.int64),
            misses=torch.zeros(1, dtype=torch.int64),
            coverage=torch.zeros(1),
            stage_ns=torch.zeros(4, dtype=torch.int64),
        )
        for tables in layers.short_tables
    ]
    width = outs[0].head_tables.shape[2]
    caches = [pools.cache.view(-1, 1, n, 2 * DIM) for pools in layers.pools]
    tables = [out.head_tables.view(HEADS, width) for out in outs]
    state = torch.randn(len(outs), HEADS * GROUP, DIM, generator=generator)
    run = attention_op(state[0].view(HEADS, GROUP, DIM).to(DTYPE), caches[0], width * n)
    samples = []
    for step in range(WARM_UP + steps):
        noise = torch.randn(state.shape, generator=generator)
        state = (1 - setting.drift) ** 0.5 * state + setting.drift**0.5 * noise
        queries = (SHARPNESS * state).to(DTYPE)
        this_step = replace(batch, step=step + 1)
        if step == WARM_UP:
            samples.clear()
            for out in outs:
                out.hits.zero_()
                out.misses.zero_()
        for layer, out in enumerate(outs):
            query = queries[layer : layer + 1]
            grouped = query.view(HEADS, GROUP, DIM)
            out.stage_ns.zero_()
            start = time.thread_time_ns()
            if layer % setting.reading.layer_share:
                ops.reuse_selection(layers.pools[layer], this_step, out)
            else:
                ops.decode_layer(geometry, layers.pools[layer], this_step, query, out)
            middle = time.thread_time_ns()
            run(grouped, caches[layer], tables[layer])
            end = time.thread_time_ns()
            samples.append([*out.stage_ns.tolist(), end - middle, end - start])
    hits = sum(int(out.hits) for out in outs)
    misses = sum(int(out.misses) for out in outs)
    return torch.tensor(samples) / 1e6, hits / (hits + misses)


INDEXES = (
    (IndexKind.TOKEN_CODES, Reduce.SOFTMAX_MEAN, math.exp(2)),  # what retention multiplies by
    (IndexKind.CENTROID, Reduce.MEAN, 0.0),
)


def measure(
    context: int,
    block_size: int,
    num_layers: int,
    drifts: Sequence[float],
    steps: int,
    reading: Reading = Reading(),  # noqa: B008  # frozen
) -> list[Result]:
    """Results of every index and drift."""
    torch.set_num_threads(1)
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # a worker does it; the op dies without
    ops = load_layer_ops("cpu")
    layers = make_layers(ops, context, block_size, num_layers, reading)
    stock = time_stock(layers, max(2, steps // 4))
    results = []
    for kind, reduce, retention in INDEXES:
        for drift in drifts:
            setting = Setting(
                context, block_size, num_layers, kind, reduce, retention, drift, reading
            )
            samples, hit_rate = time_ours(ops, layers, setting, steps)
            samples = samples.unflatten(0, (-1, reading.layer_share)).mean(1)
            score, select, resolve, swap, attend, ours = samples.median(0).values.tolist()
            results.append(
                Result(
                    setting,
                    stock_median=statistics.median(stock),
                    stock_min=min(stock),
                    ours_median=ours,
                    ours_min=float(samples[:, -1].min()),
                    score=score,
                    select=select,
                    resolve=resolve,
                    swap=swap,
                    attend=attend,
                    hit_rate=hit_rate,
                    index=layers.index_ms,
                )
            )
    return results


def show(results: Sequence[Result]) -> None:
    first = results[0]
    setting = first.setting
    print(
        f"\n{setting.reading}"
        f"\n{setting.context} tokens, block {setting.block_size}, {setting.num_layers} layers in "
        f"turn; indexing {first.index:.0f} ms a layer; ms, median and (min)"
    )
    print(
        f"{'index':11}{'drift':>6}{'hits':>8}{'stock':>17}{'ours':>16}{'ratio':>14}"
        f"{'score':>8}{'select':>8}{'resolve':>8}{'swap':>8}{'attend':>8}"
    )
    for r in results:
        print(
            f"{r.setting.kind.name:11}{r.setting.drift:6.2f}{r.hit_rate:8.1%}"
            f"{r.stock_median:9.2f} ({r.stock_min:5.2f}){r.ours_median:8.3f} ({r.ours_min:5.3f})"
            f"{r.ratio:7.1f} ({r.ratio_of_minima:4.1f})"
            f"{r.score:8.3f}{r.select:8.3f}{r.resolve:8.3f}{r.swap:8.3f}{r.attend:8.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="vLLM's CPU attention against ours, per layer")
    parser.add_argument("--context", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--block-size", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--drift", type=float, nargs="+", default=[0.0, 0.02, 0.2])
    parser.add_argument("--code-width", type=int, default=DIM, help="bits of a token's code")
    parser.add_argument("--layer-share", type=int, default=1, help="divides --layers")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", metavar="FILE", help="write the results here, too")
    args = parser.parse_args()
    reading = Reading(args.code_width, args.layer_share)
    rows: list[Result] = []
    for context in args.context:
        for block_size in args.block_size:
            for num_layers in args.layers:
                results = measure(context, block_size, num_layers, args.drift, args.steps, reading)
                show(results)
                rows += results
    if args.json:
        with open(args.json, "w") as file:
            json.dump([asdict(row) for row in rows], file, indent=1)


if __name__ == "__main__":
    main()
