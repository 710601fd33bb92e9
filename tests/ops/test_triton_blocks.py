# SPDX-License-Identifier: Apache-2.0
"""Masses of blocks and their ranks are the definition's, bit for bit."""

import math
from dataclasses import replace

import pytest
import torch

from sentencekv_vllm.ops.quantize_query import quantize_query as quantize_query_reference
from sentencekv_vllm.ops.rank_blocks import rank_blocks as rank_blocks_reference
from sentencekv_vllm.ops.rank_blocks import retention_factor
from sentencekv_vllm.ops.score_blocks import NONE, ONE, UNIT_LIMIT, BlockMasses
from sentencekv_vllm.ops.score_blocks import score_blocks as score_blocks_reference
from sentencekv_vllm.types import IndexKind

SHAPES = [  # head_dim, channels, bits, group, block_size
    (64, None, 1, 1, 16),
    (64, None, 2, 4, 32),
    (80, 40, 2, 7, 16),
    (96, 96, 1, 3, 48),
    (128, None, 2, 4, 32),
    (128, 24, 2, 2, 64),
    (128, 72, 1, 9, 128),
    (256, 256, 2, 4, 64),
]
LEVELS = ("levels", "steps", "mean_levels", "mean_steps")


def quantized(case):
    """The definition's levels and steps, as the workspace holds them."""
    grouped = case.query.unflatten(1, (case.geometry.num_kv_heads, case.geometry.group_size))
    found = quantize_query_reference(grouped, case.pools.basis, case.geometry.code_width)
    parts = (found.levels, found.step, found.mean_levels, found.mean_step)
    return {name: part.flatten(1, 2) for name, part in zip(LEVELS, parts, strict=True)}


def scored(case, device, workspace):
    """Masses by the kernel in a workspace, given the definition's levels."""
    from sentencekv_vllm.triton_kernels.score_blocks import score_blocks

    work, on_device = workspace(case, device), case.to(device)
    for name, part in quantized(case).items():
        getattr(work, name)[: len(part)] = part.to(device)
    score_blocks(on_device.geometry, on_device.pools, on_device.batch, work)
    return work


def assert_same_masses(case, work):
    expected = score_blocks_reference(case.geometry, case.pools, case.batch, case.query)
    codes = (case.batch.index_kind == IndexKind.TOKEN_CODES).tolist()
    for s, count in enumerate(case.batch.num_pages.tolist()):
        for name in ("tops", "sums"):
            result = getattr(work, name)[s].cpu()
            written = count if codes[s] else 0
            if codes[s] and case.batch.takes_everything(s):
                continue  # nothing reads them, and the definition does not work them out
            assert torch.equal(result[..., :written], getattr(expected, name)[s, ..., :written])
            assert bool((result[..., written:] == 99).all()), "nothing else is written"


def assert_same_ranks(case, masses, work, device):
    """Of kernel and definition, both given `masses`."""
    from sentencekv_vllm.triton_kernels.rank_blocks import rank_blocks

    requests, _, _, width = masses.tops.shape
    for name in ("tops", "sums"):
        part = getattr(masses, name)
        getattr(work, name)[:requests, ..., :width] = part.to(device)
    expected, actual = case.to("cpu"), case.to(device)
    reference = rank_blocks_reference(case.geometry, expected.pools, expected.batch, masses)
    rank_blocks(actual.geometry, actual.pools, actual.batch, work)
    own = case.batch.index_kind == IndexKind.TOKEN_CODES
    k_max = reference.blocks.shape[2]
    blocks, coverage = work.blocks[:requests].cpu(), work.coverage[:requests].cpu()
    assert torch.equal(blocks[own][..., :k_max], reference.blocks[own])
    assert bool((blocks[own][..., k_max:] == -1).all())
    assert torch.equal(coverage[own], reference.coverage[own])
    assert torch.equal(actual.pools.page_kept.cpu(), expected.pools.page_kept)
    assert bool((blocks[~own] == 99).all()), "rows of another index are not touched"


@pytest.mark.parametrize(("head_dim", "channels", "bits", "group", "block_size"), SHAPES)
def test_queries_are_on_the_grids_of_the_definition(
    build, kernels, workspace, head_dim, channels, bits, group, block_size
):
    from sentencekv_vllm.triton_kernels.quantize_query import quantize_query

    shape = {"head_dim": head_dim, "channels": channels, "bits": bits, "group": group}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rows = [build.row(tokens=64) for _ in range(3)]
        case = build(*rows, **shape, block_size=block_size, dtype=dtype)
        case.query[1, 0] = 0  # has step 0
        work, on_device = workspace(case, kernels), case.to(kernels)
        quantize_query(case.geometry, on_device.pools.basis, on_device.query, work)
        grouped = case.query.double().unflatten(1, (case.geometry.num_kv_heads, group))
        mapped = (grouped @ case.pools.basis.query_map.double()).flatten(1, 2)
        coded = mapped[..., : case.geometry.code_width // bits]
        exact = {"mean_levels": mapped, "levels": coded}
        if bits == 2:
            exact["levels"] = torch.cat((2 * coded, coded), -1)
        for name, part in quantized(case).items():
            result = getattr(work, name)[:3].cpu()
            if name.endswith("steps"):
                torch.testing.assert_close(result, part, rtol=2e-6, atol=0)
                continue
            step = quantized(case)[name.replace("levels", "steps")].double()
            level = exact[name] / step.clamp(min=1e-30)[..., None]
            if bits == 2 and name == "levels":  # doubled after rounding
                level[..., : coded.shape[-1]] /= 2
            far = (level - level.floor() - 0.5).abs() > 1e-3
            assert far.float().mean() > 0.98
            assert torch.equal(result[far], part[far])
            assert int((result.int() - part.int()).abs().max()) <= bits


@pytest.mark.parametrize(("head_dim", "channels", "bits", "group", "block_size"), SHAPES)
def test_masses_and_ranks_of_any_shape(
    build, kernels, workspace, head_dim, channels, bits, group, block_size
):
    rows = [
        build.row(tokens=19 * block_size + 3, retention=retention_factor(2.0)),
        build.row(tokens=0, budget=0),
        build.row(tokens=11 * block_size, budget=99),  # the whole history: no flag changes
        build.row(tokens=200, kind=IndexKind.RANDOM),
        build.row(tokens=9 * block_size, budget=2, sinks=0, recent=0),
        build.row(tokens=2 * block_size, budget=0),
    ]
    shape = {"head_dim": head_dim, "channels": channels, "bits": bits, "group": group}
    case = build(*rows, **shape, block_size=block_size, seed=group)
    case.batch.num_sentences.zero_()  # blocks need no sentences
    work = scored(case, kernels, workspace)
    assert_same_masses(case, work)
    masses = score_blocks_reference(case.geometry, case.pools, case.batch, case.query)
    assert_same_ranks(case, masses, work, kernels)


def test_more_blocks_than_a_program_scores(build, kernels, workspace):
    rows = [build.row(tokens=2600, budget=5), build.row(tokens=1025, budget=9)]
    case = build(*rows, heads=1, group=2, head_dim=32)
    work = scored(case, kernels, workspace)
    assert_same_masses(case, work)
    masses = score_blocks_reference(case.geometry, case.pools, case.batch, case.query)
    assert_same_ranks(case, masses, work, kernels)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e38, 3e4])
def test_numbers_that_are_none_or_large_do_no_harm(build, kernels, workspace, number):
    """Of a query, of all channels or of one: levels and steps of 0, or within their limits."""
    from sentencekv_vllm.triton_kernels.quantize_query import quantize_query
    from sentencekv_vllm.triton_kernels.rank_blocks import rank_blocks
    from sentencekv_vllm.triton_kernels.score_blocks import score_blocks

    case = build(build.row(), build.row(tokens=300), head_dim=64)
    case.query[0] = number
    case.query[1, 2, 5] = number
    work, on_device = workspace(case, kernels), case.to(kernels)
    pools = on_device.pools
    quantize_query(case.geometry, pools.basis, on_device.query, work)
    expected = quantized(case)
    for name in ("steps", "mean_steps"):
        torch.testing.assert_close(getattr(work, name)[:2].cpu(), expected[name], rtol=2e-6, atol=0)
    score_blocks(case.geometry, pools, on_device.batch, work)
    for s, count in enumerate(case.batch.num_pages.tolist()):
        assert int(work.tops[s, ..., :count].abs().max()) <= 2 * UNIT_LIMIT
        assert int(work.sums[s, ..., :count].min()) >= ONE
    rank_blocks(case.geometry, pools, on_device.batch, work)
    assert_selections_are_sound(case, work)


def assert_selections_are_sound(case, work):
    for s, budget in enumerate(case.batch.budget_blocks.tolist()):
        blocks = work.blocks[s].cpu()
        lo, hi = int(case.batch.history_lo[s]), int(case.batch.history_hi[s])
        chosen = blocks[:, :budget]
        assert bool(((chosen >= lo) & (chosen < hi)).all())
        assert bool((chosen.diff() > 0).all())
        assert bool((blocks[:, budget:] == -1).all())


def draw_masses(case, spread, seed):
    """Random masses; a spread of 0 makes all of them equal."""
    generator = torch.Generator().manual_seed(seed)
    requests, width = case.batch.pages.shape
    shape = (requests, case.geometry.num_kv_heads, case.geometry.group_size, width)
    tops = torch.randint(-spread, spread + 1, shape, generator=generator).int()
    more = torch.randint(0, min(spread, 3) + 1, shape, generator=generator).int()
    sums = ONE + more * (ONE // 4)
    for s, count in enumerate(case.batch.num_pages.tolist()):
        tops[s, ..., count:], sums[s, ..., count:] = NONE, 0
    return BlockMasses(tops, sums)


@pytest.mark.parametrize("spread", [0, 2, 40, 2000, 2 * UNIT_LIMIT])
@pytest.mark.parametrize("group", [1, 3, 4, 7, 16])
def test_ties_go_to_the_earlier_block(build, kernels, workspace, spread, group):
    rows = [
        build.row(tokens=16 * 70, budget=budget, retention=retention)
        for budget, retention in ((1, 1.0), (9, 3.5), (16, 1e26), (5, 0.0))
    ]
    case = build(*rows, heads=2, group=group, head_dim=16)
    masses = draw_masses(case, spread, group)
    assert_same_ranks(case, masses, workspace(case, kernels), kernels)


def test_a_request_of_many_blocks(build, kernels, workspace):
    """More than a program looks at at once, and than fits the registers of one."""
    row = build.row(tokens=16 * 9001, budget=64, ends=(16 * 9001,), retention=2.0)
    case = build(row, heads=1, group=3, head_dim=16, private=64)
    for spread in (1, 500):
        work = workspace(case, kernels)
        assert_same_ranks(case, draw_masses(case, spread, spread), work, kernels)


def test_flags_that_no_row_owns_stay(build, kernels, workspace):
    """Sinks, the recent window and other requests' pages keep theirs."""
    case = build(build.row(sinks=2, recent=5, budget=4), build.row(kind=IndexKind.CENTROID))
    case.pools.page_kept.fill_(7)
    work = workspace(case, kernels)
    masses = draw_masses(case, 50, 0)
    assert_same_ranks(case, masses, work, kernels)


def test_retention_is_worth_its_factor(build, kernels, workspace):
    """A block of half the probability stays where the factor is over two, not where it is under."""
    case = build(build.row(tokens=16 * 20, budget=1, ends=(320,)), heads=1, group=1, head_dim=16)
    page = case.batch.pages[0, 9].long()
    case.pools.page_kept.fill_(0)
    case.pools.page_kept[page] = 1
    masses = draw_masses(case, 0, 0)
    masses.tops[...] -= 400
    masses.tops[0, 0, 0, 5] = 16
    masses.tops[0, 0, 0, 9] = 0
    for factor, block in ((1.9, 5), (2.1, 9)):
        batch = replace(case.batch, retention=torch.tensor([factor]))
        work = workspace(case, kernels)
        assert_same_ranks(replace(case, batch=batch), masses, work, kernels)
        assert work.blocks[0, 0, 0] == block
