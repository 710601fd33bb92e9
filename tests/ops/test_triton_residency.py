# SPDX-License-Identifier: Apache-2.0
"""Slot lookup, LRU victims, tallies and copies equal their definitions, step after step."""

from dataclasses import replace

import pytest
import torch

from sentencekv_vllm.ops.layer_ops import DecodeOutputs
from sentencekv_vllm.ops.resolve_residency import resolve_residency as resolve_reference
from sentencekv_vllm.ops.swap_blocks import swap_in as swap_in_reference
from sentencekv_vllm.types import Selection


def draw_selection(case, generator):
    batch, heads = case.batch, case.geometry.num_kv_heads
    k_max = batch.private_blocks.shape[1]
    blocks = torch.full((len(batch.pages), heads, k_max), -1, dtype=torch.int32)
    for s, budget in enumerate(batch.budget_blocks.tolist()):
        lo, hi = int(batch.history_lo[s]), int(batch.history_hi[s])
        for h in range(heads):
            drawn = torch.randperm(hi - lo, generator=generator)[:budget] + lo
            blocks[s, h, :budget] = drawn.sort().values.int()
    return Selection(blocks, torch.rand(len(batch.pages), heads, generator=generator))


def outputs(case, device):
    requests, heads = len(case.batch.pages), case.geometry.num_kv_heads
    return DecodeOutputs(
        head_tables=torch.full((requests, heads, 50), -7, dtype=torch.int32, device=device),
        hits=torch.full((requests,), 100, dtype=torch.int64, device=device),
        misses=torch.full((requests,), 200, dtype=torch.int64, device=device),
        coverage=torch.full((requests,), 0.5, device=device),
        stage_ns=torch.zeros(4, dtype=torch.int64, device=device),
    )


def resolve(case, selection, work, out):
    from sentencekv_vllm.triton_kernels.resolve_residency import resolve_residency

    requests = len(selection.blocks)
    work.blocks[:requests] = selection.blocks
    work.coverage[:requests] = selection.coverage
    work.num_misses.zero_()
    work.step.fill_(case.batch.step)
    residency = resolve_residency(case.pools, case.batch, work, out)
    return residency.slots[:requests].cpu(), residency.misses[: int(work.num_misses)].cpu()


def assert_same_tables(actual, expected):
    for name in ("page_slot", "slot_page", "slot_stamp"):
        assert torch.equal(getattr(actual.pools, name).cpu(), getattr(expected.pools, name)), name


@pytest.mark.parametrize("private", [6, 13, 16])
def test_lru_over_steps(build, kernels, workspace, private):
    rows = [build.row(), build.row(budget=1), build.row(tokens=0), build.row(tokens=250, budget=5)]
    case = build(*rows, heads=3, private=private)
    expected, actual = case.to("cpu"), case.to(kernels)
    work, out = workspace(case, kernels), outputs(case, kernels)
    generator = torch.Generator().manual_seed(private)
    hits = misses = 0
    for step in range(5, 11):
        selection = draw_selection(case, generator)
        expected = replace(expected, batch=replace(expected.batch, step=step))
        actual = replace(actual, batch=replace(actual.batch, step=step))
        reference = resolve_reference(expected.pools, expected.batch, selection)
        slots, missed = resolve(actual, selection, work, out)
        assert torch.equal(slots, reference.slots)
        assert sorted(missed.tolist()) == sorted(reference.misses.tolist())
        assert_same_tables(actual, expected)
        misses += len(reference.misses)
        hits += int((reference.slots >= 0).sum()) - len(reference.misses)
    assert hits > 0, "the draw repeats blocks"
    assert int(out.hits.sum()) == 100 * len(rows) + hits
    assert int(out.misses.sum()) == 200 * len(rows) + misses


def test_head_tables_get_only_the_selected_columns(build, kernels, workspace):
    case = build(build.row(), build.row(sinks=4, budget=3))
    selection = draw_selection(case, torch.Generator().manual_seed(1))
    work, out = workspace(case, kernels), outputs(case, kernels)
    slots, _ = resolve(case.to(kernels), selection, work, out)
    tables, heads = out.head_tables.cpu(), torch.arange(2)[:, None]
    assert torch.equal(tables[0, :, 1:7], slots[0, :, :6] * 2 + heads)
    assert torch.equal(tables[1, :, 4:7], slots[1, :, :3] * 2 + heads)
    assert int((tables != -7).sum()) == 2 * 6 + 2 * 3
    torch.testing.assert_close(out.coverage.cpu(), 0.5 + selection.coverage.mean(1))


def test_a_reissued_page_does_not_lose_its_new_slot(build, kernels, workspace):
    """`index_pages` forgets `page_slot`, not the slot that still names the page."""
    case = build(build.row(), build.row())
    case.pools.slot_page[case.batch.private_blocks[0].long()] = case.batch.pages[1, 3]
    case.pools.page_slot[case.batch.pages[1, 3].long()] = case.batch.private_blocks[1, 0]
    case.pools.slot_page[case.batch.private_blocks[1, 0].long()] = case.batch.pages[1, 3]
    selection = draw_selection(case, torch.Generator().manual_seed(2))
    selection.blocks[1] = torch.cat(
        (torch.arange(1, 7).int(), torch.full((10,), -1, dtype=torch.int32))
    )
    actual = case.to(kernels)
    work, out = workspace(case, kernels), outputs(case, kernels)
    slots, missed = resolve(actual, selection, work, out)
    assert bool((slots[1, :, 2] == case.batch.private_blocks[1, 0]).all())
    for page, head, block in missed.tolist():
        assert int(actual.pools.page_slot[page, head]) == block
        assert int(actual.pools.slot_page[block, head]) == page


@pytest.mark.parametrize("host_dtype", ["int8", "int4", "fp8"])
@pytest.mark.parametrize(
    ("head_dim", "block_size", "dtype"),
    [(64, 16, torch.bfloat16), (96, 48, torch.float16), (128, 32, torch.float32)],
)
def test_pages_of_lower_precision_come_back_as_in_the_reference(
    build, kernels, head_dim, block_size, dtype, host_dtype
):
    from sentencekv_vllm.triton_kernels.swap_blocks import swap_in

    shape = {"head_dim": head_dim, "block_size": block_size, "dtype": dtype}
    case = build(build.row(tokens=8 * block_size), host_dtype=host_dtype, **shape)
    misses = torch.tensor([[3, 0, 7], [3, 1, 2], [9, 0, 1], [0, 1, 7]], dtype=torch.int32)
    expected, actual = case.to("cpu").pools, case.to(kernels).pools
    count = torch.tensor([3], dtype=torch.int32, device=kernels)
    swap_in_reference(expected, misses[:3])
    swap_in(actual, misses.to(kernels), count)
    result = actual.cache.cpu()
    assert torch.equal(result.view(torch.uint8), expected.cache.view(torch.uint8))


@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 16), (80, 16), (128, 128)])
def test_copies_are_byte_for_byte(build, kernels, workspace, head_dim, block_size):
    from sentencekv_vllm.triton_kernels.swap_blocks import swap_in

    case = build(build.row(tokens=8 * block_size), head_dim=head_dim, block_size=block_size)
    case.pools.host.view(torch.int16).random_(-(2**15), 2**15)  # NaN payloads among them
    misses = torch.tensor([[3, 0, 7], [3, 1, 2], [9, 0, 1], [0, 1, 7]], dtype=torch.int32)
    expected, actual = case.to("cpu").pools, case.to(kernels).pools
    count = torch.tensor([3], dtype=torch.int32, device=kernels)
    swap_in_reference(expected, misses[:3])
    swap_in(actual, misses.to(kernels), count)
    assert torch.equal(actual.cache.cpu().view(torch.int16), expected.cache.view(torch.int16))
    before = actual.cache.clone()
    swap_in(actual, misses.to(kernels), count.zero_())
    assert torch.equal(actual.cache.view(torch.int16), before.view(torch.int16))
