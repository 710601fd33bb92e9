# SPDX-License-Identifier: Apache-2.0
"""Each policy's score against the formula of its paper, written out on a handful of tokens.

Nothing of `ops` computes the expected values: keys are kept as they were drawn, loops run over
tokens and channels, and the sentences start inside blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sentencekv_vllm.ops.index_pages import index_pages
from sentencekv_vllm.ops.index_sentences import index_sentences
from sentencekv_vllm.ops.rotation import rotation
from sentencekv_vllm.ops.score_sentences import score_sentences
from sentencekv_vllm.policies import POLICIES, SelectionPolicy
from sentencekv_vllm.types import Geometry, LayerPools, SparseBatch

N, D, HEADS, GROUP, BLOCKS = 16, 64, 2, 3, 8
SINKS, HISTORY_END = 1, 7  # blocks
SENTENCES = (7, 20, 33, 35, 60, 81, 90, 112, 128)  # ends
SCALE = D**-0.5


@dataclass
class Scene:
    keys: Tensor  # [HEADS, BLOCKS * N, D]
    query: Tensor  # [HEADS * GROUP, D]
    scores: Tensor  # [HEADS, groups]
    groups: list[tuple[int, int]]  # tokens [start, end)

    def head(self, h: int, g: int) -> Tensor:
        return self.query[h * GROUP + g]


def ranked(policy: SelectionPolicy, seed: int = 0) -> Scene:
    """What the policy makes of a request in the middle of decode, in float32 but for rows."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(HEADS, BLOCKS * N, D, generator=generator)
    keys = (keys + 0.7 * torch.randn(HEADS, 1, D, generator=generator)).bfloat16().float()
    query = 2 * torch.randn(HEADS * GROUP, D, generator=generator)
    ends = [*range(N, BLOCKS * N + 1, N)] if policy.grouping == "blocks" else list(SENTENCES)
    starts = [0, *ends[:-1]]
    rows = BLOCKS * 2

    def full(shape: tuple[int, ...], dtype: torch.dtype, value: float = 0) -> Tensor:
        return torch.full(shape, value, dtype=dtype)

    content = torch.cat((keys, torch.zeros_like(keys)), -1).unflatten(1, (BLOCKS, N))
    pools = LayerPools(
        cache=content.transpose(0, 1).contiguous(),
        host=full((BLOCKS, HEADS, N, 2 * D), torch.float32),
        bits=full((BLOCKS, HEADS, D // 8, N), torch.uint8),
        scales=full((BLOCKS, HEADS, N), torch.bfloat16),
        centroids=full((rows, HEADS, D), torch.bfloat16, math.nan),
        kept=full((rows, HEADS), torch.uint8),
        page_slot=full((BLOCKS, HEADS), torch.int32, -1),
        slot_page=full((BLOCKS, HEADS), torch.int32, -1),
        slot_stamp=full((BLOCKS, HEADS), torch.int32, -1),
        spreads=full((rows, HEADS, D), torch.bfloat16, math.nan),
    )

    def column(*values: object, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    order = torch.arange(BLOCKS, dtype=torch.int32)
    token = torch.arange(N, dtype=torch.int32)[:, None] * 2 * D
    offset = (token + torch.arange(D, dtype=torch.int32)).flatten()
    index_pages(pools, order, order, offset, rotation(D))
    assert policy.index is not None
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        first = start // N
        touched = order[first : (end - 1) // N + 1][None]
        span = column((start - first * N, end - start))
        index_sentences(pools, column(i), span, touched, offset, policy.index)
    batch = SparseBatch(
        pages=order[None],
        num_pages=column(BLOCKS),
        row_pages=order[None],
        sentence_ends=column(*ends)[None],
        num_sentences=column(len(ends)),
        history_lo=column(SINKS),
        history_hi=column(HISTORY_END),
        budget_blocks=column(2),
        private_blocks=column(0, 1)[None],
        index_kind=column(int(policy.index)),
        reduce=column(int(policy.reduce)),
        retention=column(policy.retention, dtype=torch.float32),
        seed=column(0),
        step=0,
    )
    geometry = Geometry(1, HEADS, GROUP, D, N, 2, SCALE, vectors_per_row=2)
    scores, _ = score_sentences(geometry, pools, batch, query[None], rotation(D))
    return Scene(keys, query, scores[0], list(zip(starts, ends, strict=True)))


def in_history(span: tuple[int, int]) -> bool:
    return span[0] < HISTORY_END * N and span[1] > SINKS * N


def expect(scene: Scene, h: int, expected: list[float], tolerance: float) -> None:
    """Compare the groups of the history; the others have no score."""
    for i, span in enumerate(scene.groups):
        if in_history(span):
            assert float(scene.scores[h, i]) == pytest.approx(expected[i], abs=tolerance), (h, i)
        else:
            assert float(scene.scores[h, i]) == -math.inf


def log_mean_probability(
    logits: list[list[float]], resident: list[list[float]] | None = None
) -> list[float]:
    """Softmax of each head over the groups and the resident tokens, mean over heads, logarithm."""
    shares = []
    for g, head in enumerate(logits):
        total = sum(math.exp(x) for x in (*head, *(resident[g] if resident else ())))
        shares.append([math.exp(x) / total for x in head])
    means = [sum(column) / len(shares) for column in zip(*shares, strict=True)]
    return [math.log(mean) if mean else -math.inf for mean in means]


def test_quest_is_the_upper_bound_of_equation_1() -> None:
    """Quest, Eq. 1: U_i = sum_d max(Q_d * m_i,d, Q_d * M_i,d), a page being a KV block."""
    scene = ranked(POLICIES["quest"])
    assert [end - start for start, end in scene.groups] == [N] * BLOCKS
    for h in range(HEADS):
        expected = []
        for start, end in scene.groups:
            bounds = []
            for g in range(GROUP):
                q, total = scene.head(h, g).tolist(), 0.0
                for d in range(D):
                    channel = scene.keys[h, start:end, d].tolist()
                    total += max(q[d] * min(channel), q[d] * max(channel))
                products = [float(scene.head(h, g) @ scene.keys[h, t]) for t in range(start, end)]
                assert total >= max(products)
                bounds.append(SCALE * total)
            expected.append(sum(bounds) / GROUP)
        expect(scene, h, expected, 1e-4)


def test_mean_std_is_the_mean_product_plus_two_deviations() -> None:
    scene = ranked(POLICIES["mean-std"])
    for h in range(HEADS):
        logits: list[list[float]] = []
        for g in range(GROUP):
            q = scene.head(h, g).tolist()
            logits.append([])
            for start, end in scene.groups:
                mean = variance = 0.0
                for d in range(D):
                    channel = scene.keys[h, start:end, d].tolist()
                    centre = sum(channel) / len(channel)
                    mean += q[d] * centre
                    spread = sum((x - centre) ** 2 for x in channel) / len(channel)
                    variance += q[d] ** 2 * spread
                known = in_history((start, end))
                logits[-1].append(SCALE * (mean + 2 * variance**0.5) if known else -math.inf)
        expect(scene, h, log_mean_probability(logits), 0.05)  # rows are bfloat16


def test_the_paper_is_the_product_of_mean_keys_and_the_given_query() -> None:
    """SentenceKV, Eq. 1 and 3; the running mean of Eq. 2 is the worker's."""
    scene = ranked(POLICIES["sentencekv-paper"])
    for h in range(HEADS):
        expected = []
        for start, end in scene.groups:
            mean = sum(scene.keys[h, t] for t in range(start, end)) / (end - start)
            products = [SCALE * float(scene.head(h, g) @ mean) for g in range(GROUP)]
            expected.append(sum(products) / GROUP)
        expect(scene, h, expected, 0.02)  # rows are bfloat16


def test_the_default_is_the_best_tokens_one_bit_estimate() -> None:
    """RaBitQ's estimator |x|^2 / |x|_1 * <y, sign(x)> of <q, k>, y in 31 steps a side."""
    scene, turn = ranked(POLICIES["sentencekv"]), rotation(D)
    low, high = SINKS * N, HISTORY_END * N
    for h in range(HEADS):
        best: list[list[float]] = []
        resident: list[list[float]] = []
        for g in range(GROUP):
            y = (scene.head(h, g) @ turn).tolist()
            step = max(abs(value) for value in y) / 31
            estimates = []
            for t in range(BLOCKS * N):
                x = (scene.keys[h, t] @ turn).tolist()
                scale = sum(a * a for a in x) / sum(abs(a) for a in x)
                signed = [
                    round(b / step) * (1 if a >= 0 else -1) for a, b in zip(x, y, strict=True)
                ]
                estimates.append(SCALE * scale * step * sum(signed))
            spans = [(max(a, low), min(b, high)) for a, b in scene.groups]
            best.append([max(estimates[a:b], default=-math.inf) for a, b in spans])
            resident.append(estimates[:low] + estimates[high:])
        expect(scene, h, log_mean_probability(best, resident), 0.02)  # scales are bfloat16


def test_think_sums_over_the_channels_of_the_strongest_queries() -> None:
    """Groups of eight rotated channels by the sum of squared levels over the group's heads."""
    scene, turn = ranked(POLICIES["think"]), rotation(D)
    low, high = SINKS * N, HISTORY_END * N
    for h in range(HEADS):
        levels: list[list[int]] = []
        steps: list[float] = []
        for g in range(GROUP):
            y = (scene.head(h, g) @ turn).tolist()
            steps.append(max(abs(value) for value in y) / 31)
            levels.append([round(value / steps[-1]) for value in y])
        energy = [
            sum(head[d] ** 2 for head in levels for d in range(r, r + 8)) for r in range(0, D, 8)
        ]
        strongest = sorted(range(D // 8), key=lambda r: (-energy[r], r))[: D // 16]
        channels = [d for d in range(D) if d // 8 in strongest]
        best: list[list[float]] = []
        resident: list[list[float]] = []
        for g in range(GROUP):
            estimates = []
            for t in range(BLOCKS * N):
                x = (scene.keys[h, t] @ turn).tolist()
                scale = sum(a * a for a in x) / sum(abs(a) for a in x)
                signed = sum(levels[g][d] * (1 if x[d] >= 0 else -1) for d in channels)
                estimates.append(SCALE * scale * steps[g] * signed)
            spans = [(max(a, low), min(b, high)) for a, b in scene.groups]
            best.append([max(estimates[a:b], default=-math.inf) for a, b in spans])
            resident.append(estimates[:low] + estimates[high:])
        expect(scene, h, log_mean_probability(best, resident), 0.02)  # scales are bfloat16


def test_random_has_nothing_to_do_with_keys_and_is_spread_out() -> None:
    one, other = ranked(POLICIES["random"], 0), ranked(POLICIES["random"], 1)
    assert torch.equal(one.scores, other.scores), "keys and queries differ, hashes do not"
    known = one.scores[one.scores.isfinite()]
    assert len(set(known.tolist())) == len(known) and float(known.min()) >= 0
    assert float(known.max()) < 1
