# SPDX-License-Identifier: Apache-2.0
"""The sort-free selection is the definition's, tie for tie."""

import math

import pytest
import torch

from sentencekv_vllm.ops.select_blocks import select_blocks as select_blocks_reference
from sentencekv_vllm.types import IndexKind


def draw_scores(case, levels, seed=0):
    """Scores of the touched sentences from few distinct values, so that most are ties."""
    generator = torch.Generator().manual_seed(seed)
    batch, n = case.batch, case.geometry.block_size
    requests, max_sentences = batch.sentence_ends.shape
    shape = (requests, case.geometry.num_kv_heads, max_sentences)
    scores = torch.randint(-levels, levels + 1, shape, generator=generator).float() / 8
    mass = torch.rand(*shape, generator=generator)
    for s in range(requests):
        ends = batch.sentence_ends[s]
        starts = torch.cat((ends.new_zeros(1), ends[:-1]))
        lo, hi = batch.history_lo[s] * n, batch.history_hi[s] * n
        touches = (starts < hi) & (ends > lo)
        touches &= torch.arange(max_sentences) < batch.num_sentences[s]
        scores[s, :, ~touches] = -math.inf
    return scores, mass


def ranked(build, **row):
    """A row whose sentences are ranked, by whatever scores."""
    return build.row(kind=IndexKind.CENTROID, **row)


def check(case, scores, mass, kernels, workspace):
    from sentencekv_vllm.triton_kernels.locate_sentences import locate_sentences
    from sentencekv_vllm.triton_kernels.select_blocks import select_blocks

    work = workspace(case, kernels)
    for s, count in enumerate(case.batch.num_sentences.tolist()):
        work.scores[s, :, :count] = scores[s, :, :count].to(kernels)
        work.mass[s, :, :count] = mass[s, :, :count].to(kernels)
    expected, actual = case.to("cpu"), case.to(kernels)
    reference = select_blocks_reference(case.geometry, expected.pools, expected.batch, scores, mass)
    locate_sentences(actual.batch, work.first)
    blocks, coverage = select_blocks(actual.geometry, actual.pools, actual.batch, work)
    requests, _, k_max = reference.blocks.shape
    assert torch.equal(blocks[:requests, :, :k_max].cpu(), reference.blocks)
    assert bool((blocks[:requests, :, k_max:] == -1).all())
    if expected.pools.kept is not None:
        assert torch.equal(actual.pools.kept.cpu(), expected.pools.kept)
    torch.testing.assert_close(
        coverage[:requests].cpu(), reference.coverage, rtol=1e-5, atol=1e-6, equal_nan=True
    )


@pytest.mark.parametrize("levels", [0, 1, 3, 10_000])
@pytest.mark.parametrize("block_size", [16, 48, 128])
def test_selection_equals_the_sorted_fill(build, kernels, workspace, levels, block_size):
    rows = [ranked(build, tokens=block_size * 36 + 1, budget=budget) for budget in (1, 6, 16)]
    case = build(*rows, block_size=block_size, heads=3, codes=False)
    check(case, *draw_scores(case, levels, seed=levels), kernels, workspace)


def test_one_sentence_longer_than_the_budget_is_cut(build, kernels, workspace):
    case = build(ranked(build, ends=(20, 21, 400, 401, 577), budget=5))
    scores, mass = draw_scores(case, 3)
    scores[0, :, 2] = 9.0
    check(case, scores, mass, kernels, workspace)


def test_sentences_ending_on_block_borders(build, kernels, workspace):
    case = build(ranked(build, tokens=640, ends=tuple(range(16, 656, 16)), budget=7))
    check(case, *draw_scores(case, 2), kernels, workspace)


def test_one_token_sentences(build, kernels, workspace):
    case = build(ranked(build, tokens=256, ends=tuple(range(1, 257)), budget=4))
    check(case, *draw_scores(case, 10_000), kernels, workspace)


def test_whole_history_empty_budget_and_padding_rows(build, kernels, workspace):
    case = build(
        ranked(build, budget=99, tokens=200),  # covers the history: retention flags stay
        ranked(build, budget=0),
        ranked(build, tokens=0),
        ranked(build, tokens=577, sinks=0, recent=0, budget=3),
        private=40,
    )
    check(case, *draw_scores(case, 3), kernels, workspace)


def test_scores_of_both_signs_and_infinity(build, kernels, workspace):
    case = build(ranked(build, budget=4))
    scores, mass = draw_scores(case, 0)
    known = scores > -math.inf
    scores[known] = torch.where(torch.arange(int(known.sum())) % 3 == 0, -0.0, 0.0)
    scores[0, 0, 10] = math.inf
    scores[0, 1, 30] = -3.0e38
    # The definition calls 0.0 and -0.0 equal.
    check(case, scores + 0.0, mass, kernels, workspace)


def test_more_blocks_than_a_program_looks_at_at_once(build, kernels, workspace):
    tokens = 8190 * 16
    case = build(
        ranked(build, tokens=tokens, ends=tuple(range(16, tokens + 16, 16)), budget=64),
        heads=1,
        group=1,
        head_dim=16,
        private=64,
    )
    check(case, *draw_scores(case, 500), kernels, workspace)


def test_rows_of_token_codes_are_left_alone(build, kernels, workspace):
    from sentencekv_vllm.triton_kernels.select_blocks import select_blocks

    case = build(build.row(), build.row(budget=99, tokens=200))
    work, on_device = workspace(case, kernels), case.to(kernels)
    select_blocks(on_device.geometry, on_device.pools, on_device.batch, work)
    assert bool((work.blocks == 99).all() and work.coverage.isnan().all())
    assert torch.equal(on_device.pools.kept.cpu(), case.pools.kept)


def test_sentences_without_rows_are_ranked(build, kernels, workspace):
    """By nothing but chance, for one: no flag is kept."""
    rows = [build.row(kind=IndexKind.RANDOM, tokens=tokens) for tokens in (577, 300)]
    case = build(*rows, vectors=0, codes=False)
    check(case, *draw_scores(case, 100), kernels, workspace)
