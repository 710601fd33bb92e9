# SPDX-License-Identifier: Apache-2.0
"""One score per sentence and KV head: how much the current query wants it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..types import Geometry, IndexKind, LayerPools, Reduce, SparseBatch

STD_FACTOR = 2.0  # standard deviations that MEAN_STD adds
BARRED_PRODUCT = -1e30  # with what is no number: a sentence that votes have barred, for one


def random_score(seed: int, step: int, head: int, sentence: int) -> float:
    """A hash in [0, 1) (the 32-bit finaliser of MurmurHash3), equal on every platform."""
    x = (seed * 0x9E3779B1 + step * 0x85EBCA77 + head * 0xC2B2AE3D + sentence * 0x27D4EB2F) % 2**32
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
    return (x ^ (x >> 16)) / 2**32


def sentence_rows(batch: SparseBatch, s: int, rows_per_page: int) -> Tensor:
    """Row of every indexed sentence of request `s`, [num_sentences] int64."""
    i = torch.arange(int(batch.num_sentences[s]), device=batch.row_pages.device)
    pages = batch.row_pages[s].long()[i // rows_per_page]
    return pages * rows_per_page + i % rows_per_page


def _products(pools: LayerPools, rows: Tensor, query: Tensor, kind: int) -> Tensor:
    """Queries [H, G, D] against the summaries of sentences: [H, G, len(rows)].

    Within +-1e30, a NaN lowest, so that whatever a request's keys are, its sentences have an order.
    """
    product = _raw_products(pools, rows, query, kind)
    return product.nan_to_num(nan=BARRED_PRODUCT).clamp(BARRED_PRODUCT, -BARRED_PRODUCT)


def _raw_products(pools: LayerPools, rows: Tensor, query: Tensor, kind: int) -> Tensor:
    assert pools.centroids is not None, "index_vectors is 1 or 2"
    centroids = pools.centroids[rows].float().permute(1, 2, 0)  # [H, D, rows]
    if kind == IndexKind.CENTROID:
        return query @ centroids
    assert pools.spreads is not None, "index_vectors is 2"
    spreads = pools.spreads[rows].float().permute(1, 2, 0)
    if kind == IndexKind.BOUNDS:  # a negative channel is largest at the minimum
        return query.clamp(max=0) @ centroids + query.clamp(min=0) @ spreads
    return query @ centroids + STD_FACTOR * (query.square() @ spreads).sqrt()


def score_sentences(
    geometry: Geometry, pools: LayerPools, batch: SparseBatch, query: Tensor
) -> tuple[Tensor, Tensor]:
    """Score the sentences that touch the history, by their summaries.

    Requests whose index is TOKEN_CODES are left out: their blocks are ranked by `rank_blocks`.

    Logits of query head g (times the softmax scale):
      CENTROID: `<query_g, centroid>`, the centroid being that of the whole sentence. Sentences
        whose centroid is NaN come last;
      BOUNDS: `sum_d max(q_d * min_d, q_d * max_d)`, no smaller than any of its tokens' logits;
      MEAN_STD: `<q, mean> + 2 sqrt(<q^2, variance>)`.
    Reduction over the group:
      SOFTMAX_MEAN: log of the mean over g of exp(logit - Z_g), Z_g the log-sum-exp of the
        head's sentence logits;
      MAX, MEAN: of the logits.
    Then `retention` is added where `kept` is set. RANDOM ignores all of this.

    Args:
        query: [S, H * G, D]; query heads of a group are adjacent.

    Returns:
        scores [S, H, max_sentences] float32, -inf for sentences outside the history or not
        indexed; mass [S, H, max_sentences] float32: for SOFTMAX_MEAN the group's mean probability
        of each sentence, among sentences; NaN otherwise.
    """
    num_requests, max_sentences = batch.sentence_ends.shape
    heads, n = geometry.num_kv_heads, geometry.block_size
    scores = torch.full((num_requests, heads, max_sentences), float("-inf"))
    mass = torch.full((num_requests, heads, max_sentences), float("nan"))
    grouped = query.unflatten(1, (heads, geometry.group_size))
    for s in range(num_requests):
        count, kind = int(batch.num_sentences[s]), int(batch.index_kind[s])
        lo, hi = int(batch.history_lo[s]) * n, int(batch.history_hi[s]) * n
        ends = batch.sentence_ends[s, :count].tolist()
        starts = [0, *ends[:-1]]
        touches = [i for i in range(count) if max(starts[i], lo) < min(ends[i], hi)]
        if not touches or kind == IndexKind.TOKEN_CODES:
            continue
        reduce = int(batch.reduce[s])
        if kind == IndexKind.RANDOM:
            for h in range(heads):
                for i in touches:
                    scores[s, h, i] = random_score(int(batch.seed[s]), batch.step, h, i)
            continue
        rows = sentence_rows(batch, s, geometry.rows_per_page)[torch.tensor(touches)]
        sentence = geometry.scale * _products(pools, rows, grouped[s].float(), kind)
        if reduce == Reduce.SOFTMAX_MEAN:
            z = sentence.logsumexp(-1, keepdim=True)
            # In the log domain, so that sentences too unlikely for a float still have a rank.
            reduced = (sentence - z).logsumexp(1) - math.log(geometry.group_size)
            probability = (sentence - z).exp().mean(1)
            mass[s] = 0
            mass[s][:, touches] = probability
        else:
            reduced = sentence.amax(1) if reduce == Reduce.MAX else sentence.mean(1)
        assert pools.kept is not None, "rows hold vectors"
        bonus = batch.retention[s] * pools.kept[rows].transpose(0, 1)
        scores[s][:, touches] = reduced + bonus
    return scores, mass
