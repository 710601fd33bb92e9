# SPDX-License-Identifier: Apache-2.0
"""One score per sentence and KV head: how much the current query wants it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..types import Geometry, IndexKind, LayerPools, Reduce, SparseBatch
from .choose_channels import choose_channels
from .pack_keys import unpack_signs
from .quantize_query import quantize_query

STD_FACTOR = 2.0  # standard deviations that MEAN_STD adds
BARRED_PRODUCT = -1e30  # with the summary of a sentence that votes have barred, which is NaN


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
    """Queries [H, G, D] against the summaries of sentences: [H, G, len(rows)]."""
    centroids = pools.centroids[rows].float().permute(1, 2, 0)  # [H, D, rows]
    if kind == IndexKind.CENTROID:
        return (query @ centroids).nan_to_num(nan=BARRED_PRODUCT)
    assert pools.spreads is not None, "index_vectors is 2"
    spreads = pools.spreads[rows].float().permute(1, 2, 0)
    if kind == IndexKind.BOUNDS:  # a negative channel is largest at the minimum
        return query.clamp(max=0) @ centroids + query.clamp(min=0) @ spreads
    return query @ centroids + STD_FACTOR * (query.square() @ spreads).sqrt()


def score_sentences(
    geometry: Geometry,
    pools: LayerPools,
    batch: SparseBatch,
    query: Tensor,
    rotation: Tensor,
) -> tuple[Tensor, Tensor]:
    """Score the sentences that touch the history.

    Logits of query head g (times the softmax scale):
      TOKEN_BITS: the largest estimate `step_g * scale_t * <levels_g, signs_t>` over the
        sentence's tokens *inside the history*, over the channels that `choose_channels` keeps;
      CENTROID: `<query_g, centroid>`, the centroid being that of the whole sentence. Sentences
        whose centroid is NaN come last;
      BOUNDS: `sum_d max(q_d * min_d, q_d * max_d)`, no smaller than any of its tokens' logits;
      MEAN_STD: `<q, mean> + 2 sqrt(<q^2, variance>)`.
    Reduction over the group:
      SOFTMAX_MEAN: log of the mean over g of exp(logit - Z_g), Z_g the log-sum-exp of the
        head's sentence logits and, for TOKEN_BITS, of the token estimates of indexed
        blocks outside the history (sinks and recent window);
      MAX, MEAN: of the logits.
    Then `retention` is added where `kept` is set. RANDOM ignores all of this.

    Args:
        query: [S, H * G, D]; query heads of a group are adjacent.

    Returns:
        scores [S, H, max_sentences] float32, -inf for sentences outside the history or not
        indexed; mass [S, H, max_sentences + 1] float32: for SOFTMAX_MEAN the group's mean
        probability of each sentence and, last, of the resident tokens; NaN otherwise.
    """
    num_requests, max_sentences = batch.sentence_ends.shape
    heads, n = geometry.num_kv_heads, geometry.block_size
    scores = torch.full((num_requests, heads, max_sentences), float("-inf"))
    mass = torch.full((num_requests, heads, max_sentences + 1), float("nan"))
    grouped = query.unflatten(1, (heads, geometry.group_size))
    for s in range(num_requests):
        count, num_pages = int(batch.num_sentences[s]), int(batch.num_pages[s])
        lo, hi = int(batch.history_lo[s]) * n, int(batch.history_hi[s]) * n
        ends = batch.sentence_ends[s, :count].tolist()
        starts = [0, *ends[:-1]]
        touches = [i for i in range(count) if max(starts[i], lo) < min(ends[i], hi)]
        if not touches:
            continue
        kind, reduce = int(batch.index_kind[s]), int(batch.reduce[s])
        if kind == IndexKind.RANDOM:
            for h in range(heads):
                for i in touches:
                    scores[s, h, i] = random_score(int(batch.seed[s]), batch.step, h, i)
            continue
        resident = torch.empty(heads, geometry.group_size, 0)
        if kind == IndexKind.TOKEN_BITS:
            pages = batch.pages[s, :num_pages].long()
            signs = unpack_signs(pools.bits[pages]).transpose(0, 1).flatten(1, 2)  # [H, T, E]
            scale = pools.scales[pages].float().transpose(0, 1).flatten(1)  # [H, T]
            levels, step = quantize_query(grouped[s], rotation)  # [H, G, E], [H, G]
            chosen = choose_channels(levels, int(batch.byte_rows[s]))  # [H, E / 8]
            levels = levels * chosen.repeat_interleave(8, -1)[:, None]
            dots = (levels.int()[:, :, None] * signs.int()[:, None]).sum(-1)  # [H, G, T]
            logits = (geometry.scale * step)[..., None] * (dots.float() * scale[:, None])
            best = [logits[..., max(starts[i], lo) : min(ends[i], hi)].amax(-1) for i in touches]
            sentence = torch.stack(best, -1)  # [H, G, touched]
            resident = torch.cat((logits[..., :lo], logits[..., hi:]), -1)
        else:
            rows = sentence_rows(batch, s, geometry.rows_per_page)[torch.tensor(touches)]
            sentence = geometry.scale * _products(pools, rows, grouped[s].float(), kind)
        if reduce == Reduce.SOFTMAX_MEAN:
            z = torch.cat((sentence, resident), -1).logsumexp(-1, keepdim=True)
            # In the log domain, so that sentences too unlikely for a float still have a rank.
            reduced = (sentence - z).logsumexp(1) - math.log(geometry.group_size)
            probability = (sentence - z).exp().mean(1)
            mass[s] = 0
            mass[s][:, touches] = probability
            mass[s, :, -1] = (resident - z).exp().sum(-1).mean(1)
        else:
            reduced = sentence.amax(1) if reduce == Reduce.MAX else sentence.mean(1)
        rows = sentence_rows(batch, s, geometry.rows_per_page)[torch.tensor(touches)]
        bonus = batch.retention[s] * pools.kept[rows].transpose(0, 1)
        scores[s][:, touches] = reduced + bonus
    return scores, mass
