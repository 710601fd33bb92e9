# SPDX-License-Identifier: Apache-2.0
"""`decode_layer` in C++ does what the stages in plain PyTorch do, state included."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sentencekv_vllm.ops.cpu import CpuOps
from sentencekv_vllm.ops.layer_ops import DecodeOutputs, ReferenceOps
from sentencekv_vllm.ops.load import load_layer_ops
from sentencekv_vllm.ops.score_sentences import score_sentences, sentence_rows
from sentencekv_vllm.types import IndexKind, LayerPools, Reduce

from .layer_cases import UNWRITTEN, Case, Layer, Row, build, copy_pools, differing, same_bytes

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

TIE = 1e-5  # relative; scores as near as this may rank either way
SUMMARIES = (IndexKind.CENTROID, IndexKind.BOUNDS, IndexKind.MEAN_STD)
KINDS = (IndexKind.TOKEN_CODES, *SUMMARIES)


def by_mean(**changes: int) -> Row:
    return Row(kind=IndexKind.CENTROID, retention=0.3, **changes)


EVERY_KIND = tuple(
    Row(tokens, budget, kind, reduce, retention)
    for tokens, budget, kind, reduce, retention in (
        (577, 4, IndexKind.TOKEN_CODES, Reduce.SOFTMAX_MEAN, 5.0),
        (1111, 6, IndexKind.CENTROID, Reduce.MEAN, 0.0),
        (300, None, IndexKind.TOKEN_CODES, Reduce.SOFTMAX_MEAN, 5.0),
        (640, 3, IndexKind.RANDOM, Reduce.MEAN, 1.0),
        (97, 1, IndexKind.CENTROID, Reduce.SOFTMAX_MEAN, 0.5),
        (63, 2, IndexKind.TOKEN_CODES, Reduce.SOFTMAX_MEAN, 1.0),
        (800, 9, IndexKind.TOKEN_CODES, Reduce.SOFTMAX_MEAN, 1.0),
        (577, 5, IndexKind.BOUNDS, Reduce.MEAN, 0.0),
        (900, 4, IndexKind.MEAN_STD, Reduce.SOFTMAX_MEAN, 5.0),
    )
)
CASES = {
    **{f"D{d}-N32": Case(dim=d) for d in (64, 80, 96, 128, 256)},
    **{f"D{d}-N{n}": Case(dim=d, block=n) for d in (80, 128) for n in (16, 48, 64, 128)},
    **{f"G{g}": Case((Row(), Row(577, 3, kind=IndexKind.CENTROID)), group=g) for g in (1, 7, 8)},
    **{
        f"{kind.name}-{reduce.name}": Case((Row(kind=kind, reduce=reduce, retention=0.3),))
        for kind in SUMMARIES
        for reduce in Reduce
    },
    "codes-retention": Case((Row(retention=40.0), Row(retention=1.0)), group=6),
    "codes-ties": Case((Row(tokens=2000, budget=9),), dim=8, group=1),
    "every-kind": Case(EVERY_KIND, heads=3),
    "every-kind-N16": Case(EVERY_KIND, block=16, dim=80, group=7),
    "no-budget": Case((Row(budget=0), Row(budget=0, kind=IndexKind.CENTROID))),
    "whole-history": Case((Row(budget=None), Row(tokens=320, budget=None))),
    "no-history": Case((Row(tokens=90), Row(tokens=33, budget=None))),
    "sentences-longer-than-budget": Case((by_mean(tokens=2000, sentences=4, budget=3),)),
    "one-sentence": Case((by_mean(sentences=1, budget=3),)),
    "sentences-of-one-token": Case((by_mean(tokens=320, sentences=320, budget=3),)),
    "8192-tokens": Case(
        (Row(tokens=8192, budget=27), by_mean(tokens=8192, budget=27, sentences=577)),
        group=2,
        dim=64,
    ),
    "tight-working-set": Case((Row(retention=0.0, budget=5),), working_set=5),
    "float16": Case(dtype=torch.float16),
    "float32": Case(EVERY_KIND, dtype=torch.float32),
    "spread-blocks": Case(spread=True),
    **{
        f"D{d}-C{c}-N{n}": Case(EVERY_KIND, dim=d, channels=c, block=n)
        for d, c, n in ((128, 32, 32), (128, 8, 16), (128, 128, 32), (80, 48, 16))
    },
    "D256-C128-N64": Case(dim=256, channels=128, block=64),
    **{f"one-bit-D{d}": Case(dim=d, bits=1, group=5) for d in (64, 96, 128)},
    **{
        f"{host}-{dtype}": Case(host=host, dtype=dtype, dim=dim, spread=dim == 96)
        for host in ("int8", "int4", "fp8")
        for dtype, dim in ((torch.bfloat16, 128), (torch.float16, 96), (torch.float32, 64))
    },
}


@pytest.fixture(scope="module")
def ops() -> CpuOps:
    """With scratch memory that a larger layer left full of NaN."""
    cpu = load_layer_ops("cpu")
    assert isinstance(cpu, CpuOps)
    for kind in KINDS:
        larger = build(Case((Row(9000, 40, kind, sentences=900),), heads=1, group=8, dim=256))
        nan = torch.full((1, 8, 256), float("nan"))
        run(cpu, larger, larger.pools, nan, 1)
    return cpu


@pytest.fixture
def isa(ops: CpuOps, request: pytest.FixtureRequest):
    if ops.limit_isa(request.param) != request.param:
        ops.limit_isa(2)
        pytest.skip("the CPU lacks the instruction set")
    yield request.param
    ops.limit_isa(2)


def ties_only(layer: Layer, scores: Tensor, kept: Tensor, other: Tensor) -> bool:
    """Whether two selections are equal. Where they are not, the scores must be tied."""
    equal = True
    for s in range(len(layer.batch.num_pages)):
        if layer.batch.index_kind[s] == IndexKind.TOKEN_CODES:
            continue  # there are none
        rows = sentence_rows(layer.batch, s, layer.geometry.rows_per_page)
        for h in range(layer.geometry.num_kv_heads):
            mine = scores[s, h, : len(rows)][kept[rows, h] > other[rows, h]]
            theirs = scores[s, h, : len(rows)][kept[rows, h] < other[rows, h]]
            if len(mine) or len(theirs):
                equal = False
                apart = (mine[:, None] - theirs[None]).abs()
                assert float(apart.max()) <= TIE * float(mine.abs().max().clamp(min=1))
    return equal


def run(cpu: CpuOps, layer: Layer, pools: LayerPools, query: Tensor, step: int) -> DecodeOutputs:
    out = layer.outputs()
    cpu.decode_layer(layer.geometry, pools, layer.at(step), query, out)
    return out


def other_content(pools: LayerPools) -> LayerPools:
    """The same pages in another layer: other K and V in the swap pool, nothing resident."""
    other = copy_pools(pools)
    other.host.copy_(torch.randn(other.host.shape, generator=torch.Generator().manual_seed(9)))
    for table in (other.page_slot, other.slot_page, other.slot_stamp):
        table.fill_(-1)
    return other


def assert_step(ops: CpuOps, layer: Layer, mine: LayerPools, query: Tensor, step: int) -> bool:
    """One step of both, compared; returns whether the selections were equal."""
    batch, theirs = layer.at(step), layer.pools
    scores, _ = score_sentences(layer.geometry, theirs, batch, query)
    want = layer.outputs()
    ReferenceOps().decode_layer(layer.geometry, theirs, batch, query, want)
    got = run(ops, layer, mine, query, step)
    if not ties_only(layer, scores, theirs.kept, mine.kept):
        return False
    assert torch.equal(got.head_tables, want.head_tables)
    assert torch.equal(got.hits, want.hits) and torch.equal(got.misses, want.misses)
    torch.testing.assert_close(got.coverage, want.coverage, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert differing(mine, theirs) == []
    return True


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_step_leaves_the_state_of_the_reference(ops: CpuOps, case: Case) -> None:
    layer = build(case)
    mine = copy_pools(layer.pools)
    for step in range(4):
        if not assert_step(ops, layer, mine, layer.query(step), step):
            mine = copy_pools(layer.pools)


@pytest.mark.parametrize("reduce", list(Reduce))
def test_sentences_without_a_centroid_come_last(ops: CpuOps, reduce: Reduce) -> None:
    """Barred sentences (NaN, see `worker/settling.py`) fill what the others leave over."""
    row = Row(kind=IndexKind.CENTROID, reduce=reduce, retention=0.0)
    layer = build(Case((row, replace(row, tokens=577)), group=4))
    for s in range(2):
        rows = sentence_rows(layer.batch, s, layer.geometry.rows_per_page)
        layer.pools.centroids[rows[::2]] = float("nan")
        layer.pools.centroids[rows[1::6], 0] = float("nan")  # of one KV head only
    mine = copy_pools(layer.pools)
    for step in range(3):
        assert_step(ops, layer, mine, layer.query(step), step)


@pytest.mark.parametrize("name", ["every-kind", "whole-history", "no-history", "float32"])
def test_a_layer_attends_to_what_the_layer_before_selected(ops: CpuOps, name: str) -> None:
    layer = build(CASES[name])
    first, second, mine = layer.pools, other_content(layer.pools), other_content(layer.pools)
    reference = ReferenceOps()
    for step in range(4):
        batch, query = layer.at(step), layer.query(step)
        ranked, want, got = (layer.outputs() for _ in range(3))
        theirs = copy_pools(first)
        reference.decode_layer(layer.geometry, theirs, batch, query, layer.outputs())
        ops.decode_layer(layer.geometry, first, batch, query, ranked)
        assert same_bytes(theirs.kept, first.kept), "a tie: choose another seed"
        before = second.kept.clone()
        reference.reuse_selection(second, batch, want)
        ops.reuse_selection(mine, batch, got)
        assert torch.equal(got.head_tables, want.head_tables)
        assert torch.equal(got.head_tables, ranked.head_tables), "the layers' tables move alike"
        for tally in ("hits", "misses"):
            assert torch.equal(getattr(got, tally), getattr(want, tally))
        torch.testing.assert_close(got.coverage, ranked.coverage, equal_nan=True)
        assert torch.equal(second.kept, before)
        assert differing(mine, second) == []


@pytest.mark.parametrize("working_set", [4, 5, 9])
def test_lru_of_many_steps(ops: CpuOps, working_set: int) -> None:
    rows = (Row(900, 4, retention=0.0), Row(577, 3, IndexKind.RANDOM))
    layer = build(Case(rows, working_set=working_set, group=1, dim=64))
    mine = copy_pools(layer.pools)
    for step in range(40):
        query = layer.query(step // 2)  # every other step repeats its query: all hits
        assert assert_step(ops, layer, mine, query, step), "a tie: choose another seed"


@pytest.mark.parametrize("kind", KINDS)
def test_slots_of_the_table_hold_the_pages(ops: CpuOps, kind: IndexKind) -> None:
    layer = build(Case((Row(kind=kind, retention=0.0),), spread=True))
    n, heads = layer.geometry.block_size, layer.geometry.num_kv_heads
    for step in range(5):
        out = run(ops, layer, layer.pools, layer.query(step), step)
        lo, budget = int(layer.batch.history_lo), int(layer.batch.budget_blocks)
        assert bool((out.head_tables[:, :, :lo] == UNWRITTEN).all())
        assert bool((out.head_tables[:, :, lo + budget :] == UNWRITTEN).all())
        for h in range(heads):
            ids = out.head_tables[0, h, lo : lo + budget].long()
            assert bool((ids % heads == h).all())
            pages = layer.pools.slot_page[ids // heads, h].long()
            history = layer.batch.pages[0, lo : int(layer.batch.history_hi)].tolist()
            order = [history.index(page) for page in pages.tolist()]
            assert order == sorted(set(order)), "ascending, each block once"
            content = layer.pools.cache[ids // heads, h]
            assert content.shape == (budget, n, 2 * layer.geometry.head_dim)
            assert same_bytes(content, layer.pools.host[pages, h])


@pytest.mark.parametrize("isa", [0, 1, 2], indirect=True, ids=["portable", "avx2", "avx512"])
@pytest.mark.parametrize("block", [16, 32, 48, 64, 128])
@pytest.mark.parametrize(("dim", "channels", "bits"), [(80, 40, 2), (128, 64, 2), (128, None, 1)])
def test_instruction_sets_agree_bit_for_bit(
    ops: CpuOps, isa: int, block: int, dim: int, channels: int | None, bits: int
) -> None:
    """Scans are exact integers, and so is all that follows."""
    rows = (Row(1111), Row(577, retention=1.0))
    layer = build(Case(rows, block=block, dim=dim, channels=channels, bits=bits, group=7))
    mine = copy_pools(layer.pools)
    query = layer.query(0)
    narrow = run(ops, layer, mine, query, 1)
    ops.limit_isa(2)
    wide = run(ops, layer, layer.pools, query, 1)
    assert torch.equal(narrow.head_tables, wide.head_tables)
    assert same_bytes(narrow.coverage, wide.coverage)
    assert same_bytes(mine.page_kept, layer.pools.page_kept)


def test_threads_change_nothing(ops: CpuOps) -> None:
    layer = build(Case(EVERY_KIND, heads=4))
    mine = copy_pools(layer.pools)
    before = torch.get_num_threads()
    try:
        for step in range(5):
            query = layer.query(step)
            torch.set_num_threads(1)
            one = run(ops, layer, layer.pools, query, step)
            torch.set_num_threads(3)
            three = run(ops, layer, mine, query, step)
            assert torch.equal(one.head_tables, three.head_tables)
            assert same_bytes(one.coverage, three.coverage)
            assert torch.equal(one.misses, three.misses)
            assert same_bytes(layer.pools.cache, mine.cache)
    finally:
        torch.set_num_threads(before)


def test_improbable_sentences_are_ranked(ops: CpuOps) -> None:
    """Probabilities below the smallest float still have an order."""
    row = Row(kind=IndexKind.CENTROID, reduce=Reduce.SOFTMAX_MEAN, retention=0.0, budget=14)
    layer = build(Case((row,), dim=64))
    mine = copy_pools(layer.pools)
    assert assert_step(ops, layer, mine, 400 * layer.query(0), 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3e38, 1e25])
def test_no_key_and_no_query_makes_a_step_fail(ops: CpuOps, kind: IndexKind, value: float) -> None:
    """One request's overflow is its own: it selects its budget, and its neighbour as before."""
    rows = (Row(kind=kind, retention=1.0), Row(900, kind=kind, retention=1.0))
    alone = build(Case(rows, dtype=torch.float32, dim=64))
    layer = build(Case(rows, dtype=torch.float32, dim=64))
    query = layer.query(0)
    block = torch.tensor([0], dtype=torch.int32)
    for pools in (layer.pools,):
        pools.cache[0] = 1.0
        pools.cache[0, :, 3] = value
        for page in layer.batch.pages[0, 2:5]:
            ops.index_pages(pools, block, page[None], layer.key_offset)
        row = layer.batch.row_pages[0, :1] * layer.geometry.rows_per_page
        span = torch.tensor([[0, 20]], dtype=torch.int32)
        ops.index_sentences(pools, row, span, block[None], layer.key_offset, kind)
    for broken in (query, torch.cat((torch.full_like(query[:1], value), query[1:]))):
        mine, theirs = copy_pools(layer.pools), copy_pools(alone.pools)
        reference = copy_pools(layer.pools)
        got, want = run(ops, layer, mine, broken, 1), run(ops, alone, theirs, query, 1)
        assert torch.equal(got.head_tables[1], want.head_tables[1])
        assert int(got.hits[0] + got.misses[0]) == 4 * layer.geometry.num_kv_heads
        defined = layer.outputs()
        ReferenceOps().decode_layer(layer.geometry, reference, layer.at(1), broken, defined)
        assert int(defined.hits[0] + defined.misses[0]) == 4 * layer.geometry.num_kv_heads
        if kind is IndexKind.TOKEN_CODES:
            assert torch.equal(got.head_tables, defined.head_tables)


def test_reindexed_page_is_read_anew(ops: CpuOps) -> None:
    layer = build(Case((Row(retention=0.0),)))
    mine = copy_pools(layer.pools)
    assert assert_step(ops, layer, mine, layer.query(0), 1)
    resident = (layer.pools.page_slot >= 0).any(1).nonzero()[0].int()
    block = torch.tensor([0], dtype=torch.int32)
    content = torch.randn(layer.pools.cache.shape[1:], generator=torch.Generator().manual_seed(5))
    for pools, index in ((layer.pools, ReferenceOps().index_pages), (mine, ops.index_pages)):
        pools.cache[0] = content.to(pools.cache.dtype)
        index(pools, block, resident, layer.key_offset)
        assert bool((pools.page_slot[resident.long()] == -1).all())
    assert same_bytes(mine.codes, layer.pools.codes) and same_bytes(mine.host, layer.pools.host)
    for part in ("scales", "means", "mean_scales"):  # floats are added in another order
        getattr(mine, part).copy_(getattr(layer.pools, part))
    for step in range(2, 5):
        assert assert_step(ops, layer, mine, layer.query(step), step)


def test_stage_times_are_added(ops: CpuOps) -> None:
    layer = build(Case())
    out = layer.outputs()
    for step in (1, 2):
        before = out.stage_ns.clone()
        ops.decode_layer(layer.geometry, layer.pools, layer.at(step), layer.query(step), out)
        assert bool((out.stage_ns >= before).all()) and int(out.stage_ns[0]) > int(before[0])


def test_small_working_set_is_an_error(ops: CpuOps) -> None:
    layer = build(Case())
    batch = replace(layer.batch, private_blocks=layer.batch.private_blocks[:, :3])
    with pytest.raises(RuntimeError, match="private blocks"):
        ops.decode_layer(layer.geometry, layer.pools, batch, layer.query(0), layer.outputs())


@pytest.mark.parametrize("kind", [IndexKind.BOUNDS, IndexKind.MEAN_STD])
def test_two_vectors_without_room_are_an_error(ops: CpuOps, kind: IndexKind) -> None:
    layer = build(Case((Row(kind=kind),)))
    pools = replace(layer.pools, spreads=None)
    with pytest.raises(RuntimeError, match="index_vectors"):
        run(ops, layer, pools, layer.query(0), 1)
    none = torch.empty(0, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="index_vectors"):
        ops.index_sentences(pools, none, none.view(0, 2), none.view(0, 1), layer.key_offset, kind)


@pytest.mark.parametrize("kind", [IndexKind.TOKEN_CODES, IndexKind.CENTROID])
def test_an_index_that_is_not_kept_is_an_error(ops: CpuOps, kind: IndexKind) -> None:
    layer = build(Case((Row(kind=kind),)))
    pools = replace(layer.pools, codes=None, centroids=None, spreads=None)
    with pytest.raises(RuntimeError, match="index_codes"):
        run(ops, layer, pools, layer.query(0), 1)


def test_blocks_need_no_sentences(ops: CpuOps) -> None:
    layer = build(Case())
    bare = replace(layer.batch, num_sentences=torch.zeros(1, dtype=torch.int32))
    pools = replace(layer.pools, centroids=None, spreads=None, kept=None)
    got, want = layer.outputs(), layer.outputs()
    query, mine = layer.query(0), copy_pools(pools)
    ops.decode_layer(layer.geometry, mine, bare, query, got)
    ops.decode_layer(layer.geometry, layer.pools, layer.batch, query, want)
    assert torch.equal(got.head_tables, want.head_tables)


def test_history_without_sentences_is_an_error(ops: CpuOps) -> None:
    layer = build(Case((Row(kind=IndexKind.CENTROID),)))
    batch = replace(layer.batch, num_sentences=torch.zeros(1, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="touched by a sentence"):
        ops.decode_layer(layer.geometry, layer.pools, batch, layer.query(0), layer.outputs())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("num_pages", lambda t: t.long()),
        ("pages", lambda t: t.t().contiguous().t()),
        ("retention", lambda t: t.double()),
        ("seed", lambda t: t.repeat(2)),
    ],
)
def test_batches_the_c_code_cannot_read_are_refused(ops: CpuOps, name: str, change) -> None:
    layer = build(Case((Row(), Row())))
    batch = replace(layer.batch, **{name: change(getattr(layer.batch, name))})
    with pytest.raises(ValueError, match=name):
        ops.decode_layer(layer.geometry, layer.pools, batch, layer.query(0), layer.outputs())


def test_queries_and_tables_of_other_shapes_are_refused(ops: CpuOps) -> None:
    layer, other = build(Case()), build(Case((Row(), Row())))
    with pytest.raises(ValueError, match="query"):
        run(ops, layer, layer.pools, other.query(0), 1)
    with pytest.raises(ValueError, match="head_tables"):
        ops.decode_layer(
            layer.geometry,
            layer.pools,
            layer.at(1),
            layer.query(0),
            other.outputs(),
        )
