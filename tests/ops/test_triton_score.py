# SPDX-License-Identifier: Apache-2.0
"""Scores and masses equal their definitions, for every index, reduction and group size."""

import math
from dataclasses import replace

import pytest
import torch

from sentencekv_vllm.ops.quantize_query import quantize_query as quantize_query_reference
from sentencekv_vllm.ops.score_sentences import score_sentences as score_sentences_reference
from sentencekv_vllm.types import IndexKind, Reduce

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def run(case, work, quantized=None):
    from sentencekv_vllm.triton_kernels.locate_sentences import locate_sentences
    from sentencekv_vllm.triton_kernels.quantize_query import quantize_query
    from sentencekv_vllm.triton_kernels.score_sentences import score_sentences

    locate_sentences(case.batch, work.first)
    quantize_query(case.query, case.rotation, work.levels, work.steps)
    if quantized is not None:
        work.levels[: len(quantized[0])] = quantized[0]
        work.steps[: len(quantized[1])] = quantized[1]
    score_sentences(case.geometry, case.pools, case.batch, case.query, work)


def compare(case, work, rtol=TOLERANCE["rtol"], atol=TOLERANCE["atol"]):
    """Raise where `work` differs from the definition in a column that is written."""
    scores, mass = score_sentences_reference(
        case.geometry, case.pools, case.batch, case.query, case.rotation
    )
    for s, count in enumerate(case.batch.num_sentences.tolist()):
        for name, result, expected in (
            ("scores", work.scores, scores),
            ("mass", work.mass, mass),
        ):
            torch.testing.assert_close(
                result[s, :, :count].cpu(),
                expected[s, :, :count],
                rtol=rtol,
                atol=atol,
                equal_nan=True,
                msg=lambda text, s=s, name=name: f"{name} of request {s}: {text}",
            )
        if bool((scores[s] > -math.inf).any()):
            torch.testing.assert_close(
                work.mass[s, :, -1].cpu(), mass[s, :, -1], rtol=rtol, atol=atol, equal_nan=True
            )


@pytest.mark.parametrize(
    ("head_dim", "index_dim", "group"),
    [(64, 64, 1), (80, 80, 4), (96, 96, 7), (128, 128, 8), (256, 256, 4), (128, 72, 4)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantised_queries_are_the_nearest_levels(
    build, kernels, workspace, head_dim, index_dim, group, dtype
):
    from sentencekv_vllm.triton_kernels.quantize_query import quantize_query

    case = build(
        build.row(tokens=64),
        build.row(tokens=64),
        head_dim=head_dim,
        index_dim=index_dim,
        group=group,
        dtype=dtype,
    )
    case.query[1, 0] = 0  # a zero query has step 0
    levels, step = quantize_query_reference(case.query, case.rotation)
    work = workspace(case, kernels)
    on_device = case.to(kernels)
    quantize_query(on_device.query, on_device.rotation, work.levels, work.steps)
    torch.testing.assert_close(work.steps[:2].cpu(), step, rtol=1e-5, atol=0)
    exact = case.query.float() @ case.rotation / step.clamp(min=1e-9)[..., None]
    assert float((work.levels[:2].cpu().float() - exact).abs().max()) < 0.5 + 1e-3
    assert float((work.levels[:2].cpu() != levels).float().mean()) < 1e-3


@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_every_kind_and_reduction_in_one_batch(build, kernels, workspace, group):
    rows = [
        build.row(kind=kind, reduce=reduce, retention=retention, tokens=tokens)
        for (kind, tokens) in zip(IndexKind, (577, 300, 200, 400, 250), strict=True)
        for (reduce, retention) in zip(Reduce, (5.0, 0.0, 0.25), strict=True)
    ]
    case = build(*rows, build.row(tokens=0), head_dim=64, group=group, seed=group)
    work = workspace(case, kernels)
    run(case.to(kernels), work)
    compare(case, work)


@pytest.mark.parametrize(("head_dim", "block_size"), [(80, 16), (96, 48), (128, 128), (256, 32)])
def test_head_dims_and_block_sizes(build, kernels, workspace, head_dim, block_size):
    rows = [build.row(kind=kind, tokens=2000) for kind in IndexKind]
    case = build(*rows, head_dim=head_dim, block_size=block_size)
    work = workspace(case, kernels)
    run(case.to(kernels), work)
    compare(case, work)


@pytest.mark.parametrize(("index_dim", "block_size"), [(64, 32), (24, 16), (72, 64)])
def test_an_index_of_fewer_channels(build, kernels, workspace, index_dim, block_size):
    rows = [build.row(kind=kind, tokens=1300) for kind in IndexKind]
    case = build(*rows, head_dim=128, index_dim=index_dim, block_size=block_size)
    assert case.pools.bits.shape[2] == index_dim // 8
    work = workspace(case, kernels)
    run(case.to(kernels), work)
    compare(case, work)


@pytest.mark.parametrize(("index_dim", "byte_rows"), [(128, 16), (40, 5), (128, 7), (72, 1)])
def test_token_scores_are_exact(build, kernels, workspace, index_dim, byte_rows):
    """Integers on both sides: for equal levels, MAX is the definition's, bit for bit."""
    rows = [build.row(tokens=t, reduce=Reduce.MAX, byte_rows=byte_rows) for t in (1600, 577)]
    case = build(*rows, head_dim=128, index_dim=index_dim)
    work = workspace(case, kernels)
    levels, step = quantize_query_reference(case.query, case.rotation)
    run(case.to(kernels), work, (levels.to(kernels), step.to(kernels)))
    compare(case, work, rtol=0, atol=0)


def test_sentences_longer_than_a_program(build, kernels, workspace):
    """One sentence over several chunks, then one-token sentences: maxima meet across programs."""
    ends = (3, 2500, *range(2501, 2521), 2600)
    case = build(build.row(tokens=2600, ends=ends), head_dim=64)
    work = workspace(case, kernels)
    run(case.to(kernels), work)
    compare(case, work)


def test_history_borders_cut_sentences(build, kernels, workspace):
    """Tokens of a sentence outside the history count as resident, not as its evidence."""
    ends = (40, 41, 300, 577)
    for reduce in Reduce:
        case = build(build.row(ends=ends, sinks=2, recent=8, reduce=reduce))
        work = workspace(case, kernels)
        run(case.to(kernels), work)
        compare(case, work)


def test_unsealed_sentences_have_no_entry(build, kernels, workspace):
    case = build(build.row(tokens=577), build.row(tokens=577, kind=IndexKind.CENTROID))
    case.batch.num_sentences.sub_(9)
    case.batch.history_hi.sub_(12)
    work = workspace(case, kernels)
    run(case.to(kernels), work)
    compare(case, work)


def test_zero_keys_and_zero_queries_score_zero(build, kernels, workspace):
    case = build(build.row(reduce=Reduce.MAX), build.row())
    case.pools.scales[case.batch.pages[0, 3:20].long()] = 0
    case.query[1] = 0
    work = workspace(case, kernels)
    run(case.to(kernels), work)
    compare(case, work, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reduce", list(Reduce))
def test_sentences_without_a_centroid_come_last(build, kernels, workspace, reduce):
    case = build(build.row(kind=IndexKind.CENTROID, reduce=reduce), head_dim=64)
    case.pools.centroids[::2] = math.nan
    work = workspace(case, kernels)
    run(case.to(kernels), work)
    compare(case, work)
    scores = work.scores[0].cpu()
    barred = scores < -1e20
    assert barred.any() and not barred.all(), "a large negative number, above -inf"


def test_scratch_maxima_are_empty_again(build, kernels, workspace):
    from sentencekv_vllm.triton_kernels.ordered import LOWEST

    case = build(*(build.row(kind=kind) for kind in IndexKind))
    work = workspace(case, kernels)
    run(case.to(kernels), work)
    assert bool((work.best == LOWEST).all())
    colder = replace(case, query=case.query * 0.125)  # an old maximum would outlive this
    run(colder.to(kernels), work)
    compare(colder, work)


def test_far_improbable_sentences_keep_their_rank(build, kernels, workspace):
    """Probabilities below the smallest float still rank: their logarithm is never -inf."""
    case = build(build.row(tokens=320, kind=IndexKind.CENTROID, ends=tuple(range(16, 336, 16))))
    case = replace(case, query=case.query * 400)
    work = workspace(case, kernels)
    run(case.to(kernels), work)
    touched = work.scores[0, :, 1:18].cpu()
    assert bool(touched.isfinite().all())
    assert float(touched.min()) < -110
