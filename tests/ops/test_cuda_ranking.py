# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels that score and rank against their definitions, tie for tie."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sentencekv_vllm.ops.cuda_layer_ops import CudaOps
from sentencekv_vllm.ops.quantize_query import quantize_query
from sentencekv_vllm.ops.score_sentences import score_sentences
from sentencekv_vllm.ops.select_blocks import select_blocks
from sentencekv_vllm.triton_kernels.locate_sentences import locate_sentences
from sentencekv_vllm.triton_kernels.ordered import LOWEST
from sentencekv_vllm.types import IndexKind, Reduce


def prepare(case, device, workspace):
    """A workspace with the quantised query and the place of every 16th token, by definition."""
    work, batch = workspace(case, device), case.batch
    levels, steps = quantize_query(case.query, case.rotation)
    work.levels[: len(levels)] = levels.to(device)
    work.steps[: len(steps)] = steps.to(device)
    for s, count in enumerate(batch.num_sentences.tolist()):
        tokens = torch.arange(work.first.shape[1], dtype=torch.int32) * 16
        ends = batch.sentence_ends[s, :count].contiguous()
        work.first[s] = torch.searchsorted(ends, tokens, right=True).to(device, torch.int32)
    return work


def selected(case, device, workspace, codes=None):
    """The case on the device after it was scored and ranked, and its workspace.

    Args:
        codes: [S, H, I, G] int32 logits in place of those of the kernels.
    """
    work, on_device = prepare(case, device, workspace), case.to(device)
    batch = on_device.batch
    if codes is not None:
        requests, _, sentences, _ = codes.shape
        work.best[:requests, :, :sentences] = codes.to(device)
        batch = replace(batch, token_bits_only=True)
    ops = CudaOps(work)
    ops.score(on_device.geometry, on_device.pools, batch, on_device.query)
    ops.rank(on_device.geometry, on_device.pools, batch)
    assert bool((work.best == LOWEST).all()), "the next step starts from nothing"
    return on_device, work


def check_selection(case, on_device, work):
    """The selection is the definition's, given the scores that the kernel left."""
    requests, max_sentences = case.batch.sentence_ends.shape
    scores = work.scores[:requests, :, :max_sentences].cpu().clone()
    mass = torch.zeros(*scores.shape[:2], max_sentences + 1)
    mass[..., :-1] = work.mass[:requests, :, :max_sentences].cpu()
    mass[..., -1] = work.mass[:requests, :, -1].cpu()
    expected = case.to("cpu")
    reference = select_blocks(case.geometry, expected.pools, expected.batch, scores, mass)
    k_max = reference.blocks.shape[2]
    blocks = work.blocks[:requests].cpu()
    assert torch.equal(blocks[..., :k_max], reference.blocks)
    assert bool((blocks[..., k_max:] == -1).all())
    assert torch.equal(on_device.pools.kept.cpu(), expected.pools.kept)
    torch.testing.assert_close(
        work.coverage[:requests].cpu(), reference.coverage, rtol=1e-5, atol=1e-6, equal_nan=True
    )


def check_scores(case, work):
    scores, mass = score_sentences(case.geometry, case.pools, case.batch, case.query, case.rotation)
    for s, count in enumerate(case.batch.num_sentences.tolist()):
        pairs = [(work.scores[s, :, :count], scores[s, :, :count])]
        pairs.append((work.mass[s, :, :count], mass[s, :, :count]))
        if bool((scores[s] > -math.inf).any()):
            pairs.append((work.mass[s, :, -1], mass[s, :, -1]))
        for result, expected in pairs:
            torch.testing.assert_close(result.cpu(), expected, rtol=2e-5, atol=2e-5, equal_nan=True)


def check(case, device, workspace):
    on_device, work = selected(case, device, workspace)
    check_scores(case, work)
    check_selection(case, on_device, work)


SHAPES = [  # head_dim, index_dim, group
    (128, None, 4), (128, None, 8), (64, None, 1), (64, None, 2), (256, None, 5), (80, None, 3),
    (128, 72, 4), (128, 8, 7),
]  # fmt: skip


@pytest.mark.parametrize(("head_dim", "index_dim", "group"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_token_bits_of_any_shape(build, cuda_kernels, workspace, head_dim, index_dim, group, dtype):
    case = build(
        build.row(tokens=600, retention=3.0),
        build.row(tokens=0),
        build.row(tokens=331, reduce=Reduce.MAX, sinks=0),
        head_dim=head_dim,
        index_dim=index_dim,
        group=group,
        dtype=dtype,
    )
    check(case, cuda_kernels, workspace)


@pytest.mark.parametrize("block_size", [16, 32, 48, 512])
def test_blocks_of_any_size_and_more_than_one_chunk(build, cuda_kernels, workspace, block_size):
    tokens = max(2500, 6 * block_size + 9)
    rows = [build.row(tokens=tokens, budget=2), build.row(tokens=block_size * 5, recent=0)]
    check(build(*rows, block_size=block_size), cuda_kernels, workspace)


@pytest.mark.parametrize("reduce", list(Reduce))
def test_every_index_in_one_batch(build, cuda_kernels, workspace, reduce):
    rows = [build.row(tokens=200, kind=kind, reduce=reduce, retention=2.0) for kind in IndexKind]
    check(build(*rows, head_dim=32), cuda_kernels, workspace)


def test_a_block_of_threads_takes_several_chunks(build, cuda_kernels, workspace):
    """On the host there are three multiprocessors, and blocks for them all in one request."""
    rows = [build.row(tokens=tokens, budget=9) for tokens in (9000, 1030, 4096)]
    check(build(*rows, block_size=48, head_dim=128), cuda_kernels, workspace)


@pytest.mark.parametrize(("head_dim", "group"), [(128, 4), (64, 1), (256, 7), (128, 8), (64, 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_queries_are_rotated_and_rounded_as_by_triton(
    build, cuda_kernels, workspace, head_dim, group, dtype
):
    """Bit for bit, so that all implementations select the same blocks."""
    from sentencekv_vllm.triton_kernels.quantize_query import quantize_query as by_triton

    rows = (build.row(tokens=331), build.row(byte_rows=3, tokens=200), build.row(tokens=0))
    case = build(*rows, head_dim=head_dim, group=group)
    case.query[1, 0] = 0  # has step 0
    case = replace(case, query=case.query.to(dtype)).to(cuda_kernels)
    scored = []
    for rotation in (None, case.rotation):
        work = workspace(case, cuda_kernels)
        locate_sentences(case.batch, work.first)
        if rotation is None:
            by_triton(case.query, case.rotation, work.levels, work.steps)
        CudaOps(work).score(case.geometry, case.pools, case.batch, case.query, rotation)
        scored.append((work.best, work.partial[:2, :, :1]))
    assert all(torch.equal(a, b) for a, b in zip(*scored, strict=True))
    assert bool((scored[0][0] > LOWEST).any())


def test_long_and_short_sentences(build, cuda_kernels, workspace):
    case = build(
        build.row(ends=(20, 21, 400, 401, 577), budget=5),
        build.row(tokens=640, ends=tuple(range(16, 656, 16)), budget=7),
        build.row(tokens=304, ends=tuple(range(1, 305)), budget=4),
        build.row(tokens=577, ends=(577,), budget=3),
        build.row(tokens=577, ends=(40, 90), budget=3),  # what follows is not indexed
    )
    check(case, cuda_kernels, workspace)


@pytest.mark.parametrize(("group", "tokens"), [(4, 4400), (5, 2200)])
def test_more_sentences_than_the_threads_keep(build, cuda_kernels, workspace, group, tokens):
    row = build.row(tokens=tokens, ends=tuple(range(1, tokens + 1)), budget=5, retention=2.0)
    check(build(row, group=group, heads=1), cuda_kernels, workspace)


@pytest.mark.parametrize("byte_rows", [1, 5, 8])
def test_channels_that_the_query_chooses(build, cuda_kernels, workspace, byte_rows):
    rows = [build.row(byte_rows=byte_rows), build.row(byte_rows=3, tokens=200)]
    check(build(*rows, group=6), cuda_kernels, workspace)


def codes_of(scores):
    """float32 -> ordered int32, as in triton_kernels/ordered.py."""
    bits = scores.contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@pytest.mark.parametrize("levels", [0, 1, 3, 10_000])
@pytest.mark.parametrize("tokens", [577, 16 * 2070, 16 * 2700])
def test_ties(build, cuda_kernels, workspace, levels, tokens):
    """Scores of few distinct values; the longer cases have several blocks a thread, and one has
    more sentences than its threads keep."""
    rows = [
        build.row(tokens=tokens, budget=budget, kind=IndexKind.CENTROID, reduce=Reduce.MAX)
        for budget in (1, 6, 16)
    ]
    case = build(*rows, group=1, heads=2, head_dim=16)
    generator = torch.Generator().manual_seed(levels)
    requests, sentences = case.batch.sentence_ends.shape
    scores = torch.randint(-levels, levels + 1, (requests, 2, sentences, 1), generator=generator)
    codes = codes_of(scores.float() / 8)
    n = case.geometry.block_size
    for s in range(requests):
        ends = case.batch.sentence_ends[s]
        starts = torch.cat((ends.new_zeros(1), ends[:-1]))
        lo, hi = case.batch.history_lo[s] * n, case.batch.history_hi[s] * n
        inside = (starts < hi) & (ends > lo)
        inside &= torch.arange(sentences) < case.batch.num_sentences[s]
        codes[s, :, ~inside] = LOWEST
    check_selection(case, *selected(case, cuda_kernels, workspace, codes))


def test_a_budget_that_covers_the_history_and_one_of_nothing(build, cuda_kernels, workspace):
    case = build(
        build.row(budget=99, tokens=200),  # retention flags stay
        build.row(budget=0),
        build.row(tokens=0),
        build.row(tokens=577, sinks=0, recent=0, budget=3),
        private=40,
    )
    check(case, cuda_kernels, workspace)
