# SPDX-License-Identifier: Apache-2.0
"""A layer's pools and batches with everything that is not to be read poisoned."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from sentencekv_vllm.host_format import host_format
from sentencekv_vllm.ops.basis import balanced_basis, plain_basis
from sentencekv_vllm.ops.index_pages import index_pages
from sentencekv_vllm.ops.index_sentences import index_sentences
from sentencekv_vllm.ops.layer_ops import DecodeOutputs
from sentencekv_vllm.ops.quantize_query import CODE_LEVELS
from sentencekv_vllm.types import Basis, Geometry, IndexKind, LayerPools, Reduce, SparseBatch

UNWRITTEN = -7


@dataclass(frozen=True)
class Row:
    """One request of a batch; `budget` in blocks, None for the whole history."""

    tokens: int = 577
    budget: int | None = 4
    kind: IndexKind = IndexKind.TOKEN_CODES
    reduce: Reduce = Reduce.SOFTMAX_MEAN
    retention: float = 5.0  # added to a score; what multiplies a block's under TOKEN_CODES
    sentences: int = 63


@dataclass(frozen=True)
class Case:
    """Shapes of a layer and the requests that decode in it."""

    rows: tuple[Row, ...] = (Row(),)
    heads: int = 2
    group: int = 4
    dim: int = 128
    block: int = 32
    dtype: torch.dtype = torch.bfloat16
    working_set: int = 12  # blocks, more where a budget asks for it
    seed: int = 0
    channels: int | None = None  # that have a code; None: half of them
    bits: int = 2  # of a code; 1: in the fixed basis, all channels
    host: str = "auto"  # host_kv_dtype
    spread: bool = False  # blocks of the cache lie further apart than they are large


@dataclass(frozen=True)
class Layer:
    """A case in memory, indexed by the reference ops."""

    geometry: Geometry
    pools: LayerPools
    batch: SparseBatch
    key_offset: Tensor

    def outputs(self) -> DecodeOutputs:
        s, h = len(self.batch.num_pages), self.geometry.num_kv_heads
        width = int(self.batch.num_pages.max()) + 1
        return DecodeOutputs(
            head_tables=torch.full((s, h, width), UNWRITTEN, dtype=torch.int32),
            hits=torch.zeros(s, dtype=torch.int64),
            misses=torch.zeros(s, dtype=torch.int64),
            coverage=torch.zeros(s),
            stage_ns=torch.zeros(4, dtype=torch.int64),
        )

    def at(self, step: int) -> SparseBatch:
        return replace(self.batch, step=step)

    def query(self, seed: int) -> Tensor:
        """[S, H * G, D]; no mapped channel lies where two orders of summation round apart."""
        generator = torch.Generator().manual_seed(seed)
        s, heads = len(self.batch.num_pages), self.geometry.num_query_heads
        while True:
            query = torch.randn(s, heads, self.geometry.head_dim, generator=generator)
            query = (2 * query).to(self.pools.cache.dtype)
            if _is_far_from_ties(query, self.geometry, self.pools.basis):
                return query


def _is_far_from_ties(query: Tensor, geometry: Geometry, basis: Basis | None) -> bool:
    assert basis is not None
    heads, group = geometry.num_kv_heads, geometry.group_size
    mapped = query.double().unflatten(1, (heads, group)) @ basis.query_map.double()
    channels = geometry.code_width // basis.bits
    for x, levels in ((mapped, 127), (mapped[..., :channels], CODE_LEVELS[basis.bits])):
        level = x / (x.abs().amax(-1, keepdim=True) / levels)
        if float((level - level.floor() - 0.5).abs().min()) < 1e-5:
            return False
    return True


def random_basis(case: Case) -> Basis:
    """A balanced basis of made-up moments for two bits, the fixed one for one."""
    channels = case.channels or case.dim // 16 * 8 or 8
    if case.bits == 1:
        return plain_basis(case.heads, case.dim, case.dim)
    generator = torch.Generator().manual_seed(case.seed + 1)
    shape = (2, case.heads, case.dim, case.dim)
    factors = torch.randn(shape, dtype=torch.float64, generator=generator)
    moments = factors @ factors.mT / case.dim
    mean = torch.randn(case.heads, case.dim, dtype=torch.float64, generator=generator)
    return balanced_basis(*moments, mean, channels)


def copy_pools(pools: LayerPools) -> LayerPools:
    """Equal pools in other memory, with the strides of `pools`."""
    copies = {}
    for field in fields(LayerPools):
        value = getattr(pools, field.name)
        if isinstance(value, Tensor):
            copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            value = copy.copy_(value)
        copies[field.name] = value
    return LayerPools(**copies)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def differing(a: LayerPools, b: LayerPools) -> list[str]:
    """Names of the fields whose bytes differ."""
    pairs = ((f.name, getattr(a, f.name), getattr(b, f.name)) for f in fields(LayerPools))
    return [n for n, x, y in pairs if isinstance(x, Tensor) and not same_bytes(x, y)]


def make_pools(case: Case, num_pages: int, num_blocks: int, rows_per_page: int) -> LayerPools:
    """Floats are NaN, integers as of an empty cache, bits random."""
    n, d, h = case.block, case.dim, case.heads
    gap = 3 if case.spread else 0
    nan = float("nan")
    cache = torch.full((num_blocks, h * n * 2 * d + gap * 16), nan, dtype=case.dtype)
    cache = cache[:, : h * n * 2 * d].unflatten(1, (h, n, 2 * d))
    generator = torch.Generator().manual_seed(case.seed)
    basis = random_basis(case)
    width = d if case.bits == 1 else 2 * (case.channels or d // 16 * 8 or 8)
    shape = (num_pages, h, width // 8, n)
    form = host_format(case.host, n, d, case.dtype.itemsize)
    host = torch.full((num_pages, h, n, 2 * d), nan, dtype=case.dtype)
    if form is not None:
        host = torch.full((num_pages, h, form.head_block_bytes), 255, dtype=torch.uint8)
    return LayerPools(
        cache=cache,
        host=host,
        codes=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        means=torch.full((num_pages, h, d), 99, dtype=torch.int8),
        mean_scales=torch.full((num_pages, h), nan),
        page_kept=torch.full((num_pages, h), 1, dtype=torch.uint8),
        basis=basis,
        scales=torch.full((num_pages, h, n), nan, dtype=torch.bfloat16),
        centroids=torch.full((num_pages * rows_per_page, h, d), nan, dtype=torch.bfloat16),
        kept=torch.full((num_pages * rows_per_page, h), 1, dtype=torch.uint8),
        page_slot=torch.full((num_pages, h), -1, dtype=torch.int32),
        slot_page=torch.full((num_blocks, h), -1, dtype=torch.int32),
        slot_stamp=torch.full((num_blocks, h), -1, dtype=torch.int32),
        spreads=torch.full((num_pages * rows_per_page, h, d), nan, dtype=torch.bfloat16),
        host_format=form,
    )


def random_ends(tokens: int, count: int, generator: torch.Generator) -> Tensor:
    """Ends of `count` sentences that cover `tokens`; fewer if there are fewer tokens."""
    inner = torch.randperm(max(0, tokens - 1), generator=generator)[: count - 1] + 1
    return torch.cat((inner.sort().values, torch.tensor([tokens]))).int()


def build(case: Case) -> Layer:
    """Pages of the requests are interleaved and shuffled; a few stay unused and poisoned."""
    generator = torch.Generator().manual_seed(case.seed)
    n, d = case.block, case.dim
    context = [row.tokens // n for row in case.rows]
    lo = [min(1, blocks) for blocks in context]
    hi = [max(blocks - 2, low) for blocks, low in zip(context, lo, strict=True)]
    budget = [
        high - low if row.budget is None else min(row.budget, high - low)
        for row, low, high in zip(case.rows, lo, hi, strict=True)
    ]
    working_set = max(case.working_set, *budget)
    ends = [
        random_ends(blocks * n, row.sentences, generator)
        for blocks, row in zip(context, case.rows, strict=True)
    ]
    rows_per_page = max(1, n // 16)
    row_pages = [-(-len(e) // rows_per_page) for e in ends]
    num_pages = sum(context) + sum(row_pages) + 3
    num_blocks = sum(context) + working_set * len(case.rows) + 2
    pools = make_pools(case, num_pages, num_blocks, rows_per_page)
    page_ids = torch.randperm(num_pages, generator=generator).int()
    block_ids = torch.randperm(num_blocks, generator=generator).int()
    key_offset = torch.randperm(2 * n * d, generator=generator)[: n * d].int()

    count = len(case.rows)
    pages = torch.full((count, max(context) + 1), 2**30, dtype=torch.int32)
    rows = torch.full((count, max(row_pages) + 1), 2**30, dtype=torch.int32)
    padded_ends = torch.full((count, max(map(len, ends)) + 1), 2**30, dtype=torch.int32)
    private = torch.empty((count, working_set), dtype=torch.int32)
    for s, (blocks, taken) in enumerate(zip(context, row_pages, strict=True)):
        pages[s, :blocks], page_ids = page_ids[:blocks], page_ids[blocks:]
        rows[s, :taken], page_ids = page_ids[:taken], page_ids[taken:]
        padded_ends[s, : len(ends[s])] = ends[s]
        source, block_ids = block_ids[:blocks], block_ids[blocks:]
        private[s], block_ids = block_ids[:working_set], block_ids[working_set:]
        shape = (blocks, case.heads, n, 2 * d)
        pools.cache[source.long()] = torch.randn(shape, generator=generator).to(case.dtype)
        index_pages(pools, source, pages[s, :blocks], key_offset)
        starts = torch.cat((torch.zeros(1, dtype=torch.int32), ends[s][:-1]))
        width = int(((ends[s] - 1) // n - starts // n).max()) + 1
        columns = (starts // n)[:, None] + torch.arange(width)
        span_blocks = source[columns.clamp(max=blocks - 1).long()]
        i = torch.arange(len(ends[s]))
        sentence_rows = rows[s].long()[i // rows_per_page] * rows_per_page + i % rows_per_page
        spans = torch.stack((starts % n, ends[s] - starts), 1)
        kind = case.rows[s].kind
        index_sentences(pools, sentence_rows.int(), spans, span_blocks, key_offset, kind)
        pools.cache[source.long()] = float("nan")  # freed: only the pages hold it now

    batch = SparseBatch(
        pages=pages,
        num_pages=torch.tensor(context, dtype=torch.int32),
        row_pages=rows,
        sentence_ends=padded_ends,
        num_sentences=torch.tensor([len(e) for e in ends], dtype=torch.int32),
        history_lo=torch.tensor(lo, dtype=torch.int32),
        history_hi=torch.tensor(hi, dtype=torch.int32),
        budget_blocks=torch.tensor(budget, dtype=torch.int32),
        private_blocks=private,
        index_kind=torch.tensor([row.kind for row in case.rows], dtype=torch.int32),
        reduce=torch.tensor([row.reduce for row in case.rows], dtype=torch.int32),
        retention=torch.tensor([row.retention for row in case.rows], dtype=torch.float32),
        seed=torch.arange(count, dtype=torch.int32) * 77 - 5,
        step=0,
    )
    assert pools.codes is not None
    width = 8 * pools.codes.shape[2]
    geometry = Geometry(1, case.heads, case.group, d, n, rows_per_page, d**-0.5, code_width=width)
    return Layer(geometry, pools, batch, key_offset)
