# SPDX-License-Identifier: Apache-2.0
"""Pages and sentences are indexed in C++ as in plain PyTorch, up to the order of summation."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from sentencekv_vllm.ops.cpu import CpuOps
from sentencekv_vllm.ops.index_pages import index_pages, read_keys
from sentencekv_vllm.ops.index_sentences import index_sentences
from sentencekv_vllm.ops.load import load_layer_ops
from sentencekv_vllm.ops.pack_keys import unpack_signs
from sentencekv_vllm.ops.rotation import rotation
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
    Case(dim=128, index_dim=64),
    Case(dim=128, index_dim=24, block=16, dtype=torch.float32),
    Case(dim=96, index_dim=40, block=48),
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
    kept = case.index_dim or case.dim
    return f"D{case.dim}-E{kept}-N{case.block}-{case.dtype}-{case.host}"


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
    turn = rotation(case.dim, case.index_dim)
    index_pages(pools, blocks, pages, key_offset, turn)
    ops.index_pages(mine, blocks, pages, key_offset, turn)
    assert same_bytes(mine.host, pools.host)
    assert torch.equal(mine.page_slot, pools.page_slot)
    torch.testing.assert_close(
        mine.scales, pools.scales, rtol=BFLOAT16_STEP, atol=0, equal_nan=True
    )
    keys = read_keys(pools.cache[blocks.long()], key_offset, case.block)
    rotated = keys.double() @ turn.double()
    ambiguous = torch.zeros(PAGES, case.heads, case.block, turn.shape[1], dtype=torch.bool)
    ambiguous[pages.long()] = rotated.abs() < 1e-5 * keys.double().norm(dim=-1, keepdim=True)
    differs = unpack_signs(mine.bits) != unpack_signs(pools.bits)
    assert not bool((differs & ~ambiguous).any())
    assert float(ambiguous.double().mean()) < 0.001


def test_zero_keys_have_scale_zero_and_positive_signs(ops: CpuOps) -> None:
    pools, key_offset = filled(Case())
    pools.cache.zero_()
    ops.index_pages(pools, int32(1), int32(2), key_offset, rotation(128))
    assert bool((pools.scales[2] == 0).all())
    assert bool((pools.bits[2] == 255).all())


def test_any_rotation_is_followed(ops: CpuOps) -> None:
    """The butterflies stand in for Hadamard matrices only."""
    pools, key_offset = filled(Case(dtype=torch.float32))
    turn = rotation(128).clone()
    turn[5], turn[17] = turn[17].clone(), turn[5].clone()
    mine = copy_pools(pools)
    index_pages(pools, int32(3), int32(4), key_offset, turn)
    ops.index_pages(mine, int32(3), int32(4), key_offset, turn)
    assert float((mine.bits[4] != pools.bits[4]).double().mean()) < 0.001


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
    ops.index_pages(pools, none, none, key_offset, rotation(128))
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
        ops.index_pages(pools, int32(0), int32(0), key_offset, rotation(case.dim))


def test_int64_ids_are_refused(ops: CpuOps) -> None:
    pools, key_offset = filled(Case())
    with pytest.raises(ValueError, match="page_ids must be"):
        ops.index_pages(pools, int32(0), int32(0).long(), key_offset, rotation(128))
