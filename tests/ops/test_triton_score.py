# SPDX-License-Identifier: Apache-2.0
"""Scores and masses of sentences equal their definitions, for every kind, reduction and group."""

import math
from dataclasses import replace

import pytest
import torch

from sentencekv_vllm.ops.score_sentences import score_sentences as score_sentences_reference
from sentencekv_vllm.types import IndexKind, Reduce

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
KINDS = [kind for kind in IndexKind if kind != IndexKind.TOKEN_CODES]


def run(case, work):
    from sentencekv_vllm.triton_kernels.locate_sentences import locate_sentences
    from sentencekv_vllm.triton_kernels.score_sentences import score_sentences

    locate_sentences(case.batch, work.first)
    score_sentences(case.geometry, case.pools, case.batch, case.query, work)


def compare(case, work, rtol=TOLERANCE["rtol"], atol=TOLERANCE["atol"]):
    """Raise where `work` differs from the definition in a column that is written."""
    scores, mass = score_sentences_reference(case.geometry, case.pools, case.batch, case.query)
    for s, count in enumerate(case.batch.num_sentences.tolist()):
        if case.batch.index_kind[s] == IndexKind.TOKEN_CODES:
            assert bool(work.mass[s].isnan().all() and work.scores[s].isnan().all())
            continue
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
    rows = [build.row(kind=kind, tokens=2000) for kind in KINDS]
    case = build(*rows, head_dim=head_dim, block_size=block_size)
    work = workspace(case, kernels)
    run(case.to(kernels), work)
    compare(case, work)


def test_rows_of_one_vector_and_of_none(build, kernels, workspace):
    one = [build.row(kind=kind, retention=2.0) for kind in (IndexKind.CENTROID, IndexKind.RANDOM)]
    for rows, vectors in ((one, 1), (one[1:], 0)):
        case = build(*rows, vectors=vectors, codes=False)
        work = workspace(case, kernels)
        run(case.to(kernels), work)
        compare(case, work)


def test_sentences_longer_than_a_program(build, kernels, workspace):
    """One sentence over many blocks, then one-token sentences."""
    ends = (3, 2500, *range(2501, 2521), 2600)
    case = build(build.row(tokens=2600, ends=ends, kind=IndexKind.CENTROID), head_dim=64)
    work = workspace(case, kernels)
    run(case.to(kernels), work)
    compare(case, work)


def test_history_borders_cut_sentences(build, kernels, workspace):
    ends = (40, 41, 300, 577)
    for reduce in Reduce:
        kind = IndexKind.CENTROID
        case = build(build.row(ends=ends, sinks=2, recent=8, reduce=reduce, kind=kind))
        work = workspace(case, kernels)
        run(case.to(kernels), work)
        compare(case, work)


def test_unsealed_sentences_have_no_entry(build, kernels, workspace):
    kinds = (IndexKind.BOUNDS, IndexKind.CENTROID)
    case = build(*(build.row(tokens=577, kind=kind) for kind in kinds))
    case.batch.num_sentences.sub_(9)
    case.batch.history_hi.sub_(12)
    work = workspace(case, kernels)
    run(case.to(kernels), work)
    compare(case, work)


def test_products_stay_within_their_limits(build, kernels, workspace):
    """Whatever keys and queries are, a sentence has a score, and one that is a number."""
    rows = [build.row(kind=kind, reduce=Reduce.MAX) for kind in KINDS]
    case = build(*rows, head_dim=64)
    case.pools.centroids[::3] = math.inf
    case.pools.centroids[1::3, :, 7] = -3e38
    case.pools.spreads[::2] = math.nan
    case.query[:, ::2] *= 1e4
    work = workspace(case, kernels)
    run(case.to(kernels), work)
    compare(case, work)
    for s, count in enumerate(case.batch.num_sentences.tolist()):
        touched = work.scores[s, :, :count].cpu()
        assert not bool(touched.isnan().any())
        assert bool((touched < math.inf).all())


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
