# SPDX-License-Identifier: Apache-2.0
"""The sort-free selection is the definition's, tie for tie."""

import math

import pytest
import torch

from sentencekv_vllm.ops.select_blocks import select_blocks as select_blocks_reference


def draw_scores(case, levels, seed=0):
    """Scores of the touched sentences from few distinct values, so that most are ties."""
    generator = torch.Generator().manual_seed(seed)
    batch, n = case.batch, case.geometry.block_size
    requests, max_sentences = batch.sentence_ends.shape
    shape = (requests, case.geometry.num_kv_heads, max_sentences)
    scores = torch.randint(-levels, levels + 1, shape, generator=generator).float() / 8
    mass = torch.rand(*shape[:2], max_sentences + 1, generator=generator)
    for s in range(requests):
        ends = batch.sentence_ends[s]
        starts = torch.cat((ends.new_zeros(1), ends[:-1]))
        lo, hi = batch.history_lo[s] * n, batch.history_hi[s] * n
        touches = (starts < hi) & (ends > lo)
        touches &= torch.arange(max_sentences) < batch.num_sentences[s]
        scores[s, :, ~touches] = -math.inf
    return scores, mass


def check(case, scores, mass, kernels, workspace):
    from sentencekv_vllm.triton_kernels.locate_sentences import locate_sentences
    from sentencekv_vllm.triton_kernels.select_blocks import select_blocks

    work = workspace(case, kernels)
    for s, count in enumerate(case.batch.num_sentences.tolist()):
        work.scores[s, :, :count] = scores[s, :, :count].to(kernels)
        work.mass[s, :, :count] = mass[s, :, :count].to(kernels)
        work.mass[s, :, -1] = mass[s, :, -1].to(kernels)
    expected, actual = case.to("cpu"), case.to(kernels)
    reference = select_blocks_reference(case.geometry, expected.pools, expected.batch, scores, mass)
    locate_sentences(actual.batch, work.first)
    blocks, coverage = select_blocks(actual.geometry, actual.pools, actual.batch, work)
    requests, _, k_max = reference.blocks.shape
    assert torch.equal(blocks[:requests, :, :k_max].cpu(), reference.blocks)
    assert bool((blocks[:requests, :, k_max:] == -1).all())
    assert torch.equal(actual.pools.kept.cpu(), expected.pools.kept)
    torch.testing.assert_close(
        coverage[:requests].cpu(), reference.coverage, rtol=1e-5, atol=1e-6, equal_nan=True
    )


@pytest.mark.parametrize("levels", [0, 1, 3, 10_000])
@pytest.mark.parametrize("block_size", [16, 48, 128])
def test_selection_equals_the_sorted_fill(build, kernels, workspace, levels, block_size):
    rows = [build.row(tokens=block_size * 36 + 1, budget=budget) for budget in (1, 6, 16)]
    case = build(*rows, block_size=block_size, heads=3)
    check(case, *draw_scores(case, levels, seed=levels), kernels, workspace)


def test_one_sentence_longer_than_the_budget_is_cut(build, kernels, workspace):
    case = build(build.row(ends=(20, 21, 400, 401, 577), budget=5))
    scores, mass = draw_scores(case, 3)
    scores[0, :, 2] = 9.0
    check(case, scores, mass, kernels, workspace)


def test_sentences_ending_on_block_borders(build, kernels, workspace):
    case = build(build.row(tokens=640, ends=tuple(range(16, 656, 16)), budget=7))
    check(case, *draw_scores(case, 2), kernels, workspace)


def test_one_token_sentences(build, kernels, workspace):
    case = build(build.row(tokens=256, ends=tuple(range(1, 257)), budget=4))
    check(case, *draw_scores(case, 10_000), kernels, workspace)


def test_whole_history_empty_budget_and_padding_rows(build, kernels, workspace):
    case = build(
        build.row(budget=99, tokens=200),  # covers the history: retention flags stay
        build.row(budget=0),
        build.row(tokens=0),
        build.row(tokens=577, sinks=0, recent=0, budget=3),
        private=40,
    )
    check(case, *draw_scores(case, 3), kernels, workspace)


def test_scores_of_both_signs_and_infinity(build, kernels, workspace):
    case = build(build.row(budget=4))
    scores, mass = draw_scores(case, 0)
    known = scores > -math.inf
    scores[known] = torch.where(torch.arange(int(known.sum())) % 3 == 0, -0.0, 0.0)
    scores[0, 0, 10] = math.inf
    scores[0, 1, 30] = -3.0e38
    # The definition calls 0.0 and -0.0 equal.
    check(case, scores + 0.0, mass, kernels, workspace)


def test_as_many_blocks_as_fit_one_program(build, kernels, workspace):
    tokens = 8190 * 16
    case = build(
        build.row(tokens=tokens, ends=tuple(range(16, tokens + 16, 16)), budget=64),
        heads=1,
        group=1,
        head_dim=16,
        private=64,
    )
    check(case, *draw_scores(case, 500), kernels, workspace)
