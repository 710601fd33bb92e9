# SPDX-License-Identifier: Apache-2.0
"""Pages and sentences are indexed in C++ as in plain PyTorch, up to the order of summation."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sentencekv_vllm.ops.cpu import CpuOps
from sentencekv_vllm.ops.index_pages import index_pages, read_keys
from sentencekv_vllm.ops.index_sentences import index_sentences
from sentencekv_vllm.ops.load import load_layer_ops
from sentencekv_vllm.ops.pack_keys import unpack_signs
from sentencekv_vllm.types import IndexKind, LayerPools

from .layer_cases import Case, copy_pools, make_pools, same_bytes

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

PAGES, BLOCKS, ROWS = 9, 7, 3  # rows a page
BFLOAT16_STEP = 2.0**-7  # largest relative distance of neighbours
SHAPES = [
    Case(dim=dim, block=block, dtype=dtype, spread=block == 32)
    for dim, block, dtype in (
        (64, 16, torch.bfloat16),
        (128, 32, torch.bfloat16),
        (128, 128, torch.float32),
        (256, 64, torch.float16),
        (80, 32, torch.bfloat16),
        (96, 48, torch.float16),
        (8, 16, torch.float32),
    )
] + [
    Case(dim=128, channels=128),
    Case(dim=128, channels=24, block=16, dtype=torch.float32),
    Case(dim=96, channels=40, block=48),
    Case(dim=128, bits=1),
    Case(dim=80, bits=1, block=16, dtype=torch.float16),
]


COARSE = [
    Case(dim=dim, block=block, dtype=dtype, host=host)
    for host in ("int8", "int4", "fp8")
    for dim, block, dtype in (
        (64, 16, torch.bfloat16),
        (96, 48, torch.float16),
        (128, 32, torch.float32),
    )
]


def name(case: Case) -> str:
    return f"D{case.dim}-C{case.channels}x{case.bits}-N{case.block}-{case.dtype}-{case.host}"


@pytest.fixture(scope="module")
def ops() -> CpuOps:
    cpu = load_layer_ops("cpu")
    assert isinstance(cpu, CpuOps)
    return cpu


def filled(case: Case) -> tuple[LayerPools, Tensor]:
    """Pools with random blocks, and key offsets in random order."""
    generator = torch.Generator().manual_seed(case.dim + case.block)
    pools = make_pools(case, PAGES, BLOCKS, ROWS)
    pools.cache.copy_(torch.randn(pools.cache.shape, generator=generator))
    pools.page_slot.fill_(2)
    order = torch.randperm(2 * case.block * case.dim, generator=generator)
    return pools, order[: case.block * case.dim].int()


def int32(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("case", SHAPES + COARSE, ids=name)
def test_index_pages(ops: CpuOps, case: Case) -> None:
    pools, key_offset = filled(case)
    mine = copy_pools(pools)
    blocks, pages = int32(4, 0, 6, 0), int32(8, 3, 1, 5)
    index_pages(pools, blocks, pages, key_offset)
    ops.index_pages(mine, blocks, pages, key_offset)
    assert same_bytes(mine.host, pools.host)
    assert torch.equal(mine.page_slot, pools.page_slot)
    assert torch.equal(mine.page_kept, pools.page_kept)
    assert bool((pools.page_kept[pages.long()] == 0).all())
    assert bool((pools.page_kept[[0, 2, 4, 6, 7]] == 1).all()), "of other pages"
    torch.testing.assert_close(
        mine.mean_scales, pools.mean_scales, rtol=1e-5, atol=0, equal_nan=True
    )
    assert int((mine.means.int() - pools.means.int()).abs().max()) <= 1
    assert float((mine.means != pools.means).double().mean()) < 0.001
    torch.testing.assert_close(
        mine.scales, pools.scales, rtol=BFLOAT16_STEP, atol=0, equal_nan=True
    )
    differs = unpack_signs(mine.codes) != unpack_signs(pools.codes)
    assert float(differs.double().mean()) < 0.0005, "channels at a threshold"


def test_estimates_are_near_the_products(ops: CpuOps) -> None:
    """What a code and a mean say together is the product of query and key, but for the error that
    two bits of half of the channels leave."""
    case = Case(dim=64, dtype=torch.float32)
    pools, key_offset = filled(case)
    ops.index_pages(pools, int32(4), int32(8), key_offset)
    basis = pools.basis
    keys = read_keys(pools.cache[4], key_offset, case.block)  # [H, N, D]
    queries = torch.randn(2, 500, case.dim, generator=torch.Generator().manual_seed(1))
    y = queries @ basis.query_map
    signs = unpack_signs(pools.codes[8]).float()
    code = 2 * signs[..., :32] + signs[..., 32:]
    fine = (y[..., :32] @ code.mT) * pools.scales[8].float()[:, None]
    mean = pools.means[8].float() * pools.mean_scales[8][:, None] + basis.center
    estimate = fine + (y @ mean[..., None])
    exact = queries @ keys.mT
    assert float((estimate - exact).std() / exact.std()) < 0.9
    related = torch.corrcoef(torch.stack((estimate.flatten(), exact.flatten())))[0, 1]
    assert float(related) > 0.5


def test_equal_keys_are_their_mean(ops: CpuOps) -> None:
    pools, key_offset = filled(Case(dtype=torch.float32))
    pools.cache.fill_(1.5)
    ops.index_pages(pools, int32(1), int32(2), key_offset)
    spread = pools.mean_scales[2] * 127
    assert bool((pools.scales[2].float() < 0.01 * spread[:, None]).all()), "only what rounding left"


def test_keys_of_zero_in_a_basis_without_a_center(ops: CpuOps) -> None:
    pools, key_offset = filled(Case(bits=1))
    pools.cache.zero_()
    ops.index_pages(pools, int32(1), int32(2), key_offset)
    assert bool((pools.scales[2] == 0).all()) and bool((pools.mean_scales[2] == 0).all())
    assert bool((pools.means[2] == 0).all()) and bool((pools.codes[2] == 255).all())


def test_a_server_without_codes_copies_pages_only(ops: CpuOps) -> None:
    pools, key_offset = filled(Case())
    bare = replace(pools, codes=None, scales=None, means=None, mean_scales=None, page_kept=None)
    before = copy_pools(pools)
    for index in (index_pages, ops.index_pages):
        index(bare, int32(1), int32(2), key_offset)
    assert same_bytes(pools.codes, before.codes) and same_bytes(pools.host[2], pools.cache[1])


@pytest.mark.parametrize("kind", [IndexKind.CENTROID, IndexKind.BOUNDS, IndexKind.MEAN_STD])
@pytest.mark.parametrize("case", SHAPES, ids=name)
def test_index_sentences(ops: CpuOps, case: Case, kind: IndexKind) -> None:
    pools, key_offset = filled(case)
    mine = copy_pools(pools)
    n = case.block
    rows = int32(0, 26, 7, 11)
    spans = int32((0, 1), (n - 1, 2), (3, n - 3), (n // 2, 2 * n))
    span_blocks = int32((5, -1, -1), (6, 0, -1), (2, -1, -1), (1, 4, 3))
    for index, target in ((index_sentences, pools), (ops.index_sentences, mine)):
        index(target, rows, spans, span_blocks, key_offset, kind)
    for name in ("centroids", "spreads"):
        torch.testing.assert_close(
            getattr(mine, name), getattr(pools, name), rtol=BFLOAT16_STEP, atol=1e-6, equal_nan=True
        )
    assert torch.equal(mine.kept, pools.kept)
    assert int((mine.kept == 0).sum()) == len(rows) * case.heads


def test_nothing_to_index(ops: CpuOps) -> None:
    pools, key_offset = filled(Case())
    before = copy_pools(pools)
    none = torch.empty(0, dtype=torch.int32)
    ops.index_pages(pools, none, none, key_offset)
    ops.index_sentences(pools, none, none.view(0, 2), none.view(0, 1), key_offset)
    assert same_bytes(pools.host, before.host) and same_bytes(pools.kept, before.kept)


@pytest.mark.parametrize(
    ("case", "rule"),
    [
        (Case(block=24), "block_size a multiple of 16"),
        (Case(dim=60), "head_dim one of 8"),
        (Case(dtype=torch.float64), "bf16, fp16 or fp32"),
    ],
    ids=["block", "dim", "dtype"],
)
def test_unreadable_caches_are_refused(ops: CpuOps, case: Case, rule: str) -> None:
    pools, key_offset = filled(case)
    with pytest.raises(ValueError, match=rule):
        ops.index_pages(pools, int32(0), int32(0), key_offset)


def test_int64_ids_are_refused(ops: CpuOps) -> None:
    pools, key_offset = filled(Case())
    with pytest.raises(ValueError, match="page_ids must be"):
        ops.index_pages(pools, int32(0), int32(0).long(), key_offset)
