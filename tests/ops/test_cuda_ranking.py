# SPDX-License-Identifier: Apache-2.0
"""The CUDA ranking of sentences against its definition, tie for tie, beside requests of blocks."""

from __future__ import annotations

import math

import pytest
import torch

from sentencekv_vllm.ops.cuda_layer_ops import CudaOps
from sentencekv_vllm.ops.rank_blocks import rank_blocks
from sentencekv_vllm.ops.score_blocks import score_blocks
from sentencekv_vllm.ops.score_sentences import score_sentences
from sentencekv_vllm.ops.select_blocks import select_blocks
from sentencekv_vllm.triton_kernels.ordered import LOWEST
from sentencekv_vllm.types import IndexKind, Reduce


def prepare(case, device, workspace):
    """A workspace with the place of every 16th token, by definition."""
    work, batch = workspace(case, device), case.batch
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
    ops = CudaOps(work)
    if codes is None:
        ops.score(on_device.geometry, on_device.pools, batch, on_device.query)
    ops.rank(on_device.geometry, on_device.pools, batch)
    assert bool((work.best == LOWEST).all()), "the next step starts from nothing"
    return on_device, work


def merged(of_blocks, of_sentences, codes):
    """Rows of the first where `codes` is set, else of the second."""
    return torch.where(codes.view(-1, *[1] * (of_blocks.dim() - 1)), of_blocks, of_sentences)


def check_selection(case, on_device, work):
    """The selection is the definition's, given the scores that the kernel left."""
    requests, max_sentences = case.batch.sentence_ends.shape
    scores = work.scores[:requests, :, :max_sentences].cpu().clone()
    mass = work.mass[:requests, :, :max_sentences].cpu().clone()
    expected = case.to("cpu")
    by_sentences = select_blocks(case.geometry, expected.pools, expected.batch, scores, mass)
    masses = score_blocks(case.geometry, case.pools, case.batch, case.query)
    by_blocks = rank_blocks(case.geometry, expected.pools, expected.batch, masses)
    codes = case.batch.index_kind == IndexKind.TOKEN_CODES
    reference = merged(by_blocks.blocks, by_sentences.blocks, codes)
    k_max = reference.shape[2]
    blocks = work.blocks[:requests].cpu()
    assert torch.equal(blocks[..., :k_max], reference)
    assert bool((blocks[..., k_max:] == -1).all())
    for name in ("kept", "page_kept"):
        assert torch.equal(getattr(on_device.pools, name).cpu(), getattr(expected.pools, name))
    torch.testing.assert_close(
        work.coverage[:requests].cpu(),
        merged(by_blocks.coverage, by_sentences.coverage, codes),
        rtol=1e-5,
        atol=1e-6,
        equal_nan=True,
    )


def check_scores(case, work):
    scores, mass = score_sentences(case.geometry, case.pools, case.batch, case.query)
    for s, count in enumerate(case.batch.num_sentences.tolist()):
        if int(case.batch.index_kind[s]) == IndexKind.TOKEN_CODES:
            continue
        pairs = [(work.scores[s, :, :count], scores[s, :, :count])]
        if bool((scores[s] > -math.inf).any()):
            pairs.append((work.mass[s, :, :count], mass[s, :, :count]))
        for result, expected in pairs:
            torch.testing.assert_close(result.cpu(), expected, rtol=2e-5, atol=2e-5, equal_nan=True)


def check(case, device, workspace):
    on_device, work = selected(case, device, workspace)
    check_scores(case, work)
    check_selection(case, on_device, work)


@pytest.mark.parametrize(("head_dim", "group"), [(128, 4), (64, 1), (80, 3), (32, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sentences_of_any_shape(build, cuda_kernels, workspace, head_dim, group, dtype):
    case = build(
        build.row(tokens=600, retention=3.0, kind=IndexKind.CENTROID),
        build.row(tokens=0, kind=IndexKind.CENTROID),
        build.row(tokens=331, reduce=Reduce.MAX, sinks=0, kind=IndexKind.MEAN_STD),
        head_dim=head_dim,
        group=group,
        dtype=dtype,
    )
    check(case, cuda_kernels, workspace)


@pytest.mark.parametrize("reduce", list(Reduce))
def test_every_index_in_one_batch(build, cuda_kernels, workspace, reduce):
    rows = [build.row(tokens=200, kind=kind, reduce=reduce, retention=2.0) for kind in IndexKind]
    case = build(*rows, head_dim=32)
    check(case, cuda_kernels, workspace)


def test_long_and_short_sentences(build, cuda_kernels, workspace):
    kind = IndexKind.CENTROID
    case = build(
        build.row(ends=(20, 21, 400, 401, 577), budget=5, kind=kind),
        build.row(tokens=640, ends=tuple(range(16, 656, 16)), budget=7, kind=kind),
        build.row(tokens=304, ends=tuple(range(1, 305)), budget=4, kind=kind),
        build.row(tokens=577, ends=(577,), budget=3, kind=kind),
        build.row(tokens=577, ends=(40, 560), budget=3, kind=kind),  # the rest is not indexed
    )
    check(case, cuda_kernels, workspace)


@pytest.mark.parametrize(("group", "tokens"), [(4, 4400), (5, 2200)])
def test_more_sentences_than_the_threads_keep(build, cuda_kernels, workspace, group, tokens):
    ends = tuple(range(1, tokens + 1))
    row = build.row(tokens=tokens, ends=ends, budget=5, retention=2.0, kind=IndexKind.CENTROID)
    check(build(row, group=group, heads=1, head_dim=16), cuda_kernels, workspace)


@pytest.mark.parametrize("number", [math.nan, math.inf, 1e30])
def test_sentences_of_no_numbers_still_have_an_order(build, cuda_kernels, workspace, number):
    case = build(
        build.row(kind=IndexKind.CENTROID),
        build.row(kind=IndexKind.BOUNDS, reduce=Reduce.MEAN),
    )
    case.query[0, 3] = number
    case.query[1] = number
    case.pools.centroids[::3] = number
    _, work = selected(case, cuda_kernels, workspace)
    for s, budget in enumerate(case.batch.budget_blocks.tolist()):
        chosen = work.blocks[s, :, :budget].cpu()
        assert bool((chosen.diff() > 0).all())
        lo, hi = int(case.batch.history_lo[s]), int(case.batch.history_hi[s])
        assert bool(((chosen >= lo) & (chosen < hi)).all())


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
    kind = IndexKind.CENTROID
    case = build(
        build.row(budget=99, tokens=200, kind=kind),  # retention flags stay
        build.row(budget=0, kind=kind),
        build.row(tokens=0, kind=kind),
        build.row(tokens=577, sinks=0, recent=0, budget=3, kind=kind),
        private=40,
    )
    check(case, cuda_kernels, workspace)
