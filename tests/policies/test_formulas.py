# SPDX-License-Identifier: Apache-2.0
"""Each policy's score against the formula of its paper, written out on a handful of tokens.

Nothing of `ops` computes the expected values: keys are kept as they were drawn, loops run over
tokens and channels, and the sentences start inside blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from sentencekv_vllm.ops.basis import balanced_basis
from sentencekv_vllm.ops.index_pages import index_pages
from sentencekv_vllm.ops.index_sentences import index_sentences
from sentencekv_vllm.ops.rank_blocks import rank_blocks
from sentencekv_vllm.ops.score_blocks import score_blocks
from sentencekv_vllm.ops.score_sentences import score_sentences
from sentencekv_vllm.policies import POLICIES, SelectionPolicy
from sentencekv_vllm.types import Geometry, LayerPools, SparseBatch

N, D, HEADS, GROUP, BLOCKS = 16, 64, 2, 3, 8
CHANNELS = 32  # that have a code
SINKS, HISTORY_END = 1, 7  # blocks
SENTENCES = (7, 20, 33, 35, 60, 81, 90, 112, 128)  # ends
SCALE = D**-0.5


@dataclass
class Scene:
    keys: Tensor  # [HEADS, BLOCKS * N, D]
    query: Tensor  # [HEADS * GROUP, D]
    scores: Tensor  # [HEADS, groups]
    groups: list[tuple[int, int]]  # tokens [start, end)
    geometry: Geometry
    pools: LayerPools
    batch: SparseBatch

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
        codes=full((BLOCKS, HEADS, 2 * CHANNELS // 8, N), torch.uint8),
        scales=full((BLOCKS, HEADS, N), torch.bfloat16),
        means=full((BLOCKS, HEADS, D), torch.int8),
        mean_scales=full((BLOCKS, HEADS), torch.float32),
        page_kept=full((BLOCKS, HEADS), torch.uint8),
        basis=balanced_basis(
            *(x.mT @ x for x in torch.randn(2, HEADS, 99, D, generator=generator).double()),
            torch.zeros(HEADS, D).double(),
            CHANNELS,
        ),
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
    index_pages(pools, order, order, offset)
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
    geometry = Geometry(1, HEADS, GROUP, D, N, 2, SCALE, vectors_per_row=2, code_width=2 * CHANNELS)
    scores, _ = score_sentences(geometry, pools, batch, query[None])
    spans = list(zip(starts, ends, strict=True))
    return Scene(keys, query, scores[0], spans, geometry, pools, batch)


def in_history(span: tuple[int, int]) -> bool:
    return span[0] < HISTORY_END * N and span[1] > SINKS * N


def expect(scene: Scene, h: int, expected: list[float], tolerance: float) -> None:
    """Compare the groups of the history; the others have no score."""
    for i, span in enumerate(scene.groups):
        if in_history(span):
            assert float(scene.scores[h, i]) == pytest.approx(expected[i], abs=tolerance), (h, i)
        else:
            assert float(scene.scores[h, i]) == -math.inf


def log_mean_probability(logits: list[list[float]]) -> list[float]:
    """Softmax of each head over the groups, mean over heads, logarithm."""
    shares = []
    for head in logits:
        total = sum(math.exp(x) for x in head)
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


def test_the_default_is_the_mass_of_a_block_by_means_and_two_bit_codes() -> None:
    """docs/method.md: log2 of the sum of 2^estimate over a block, in 1/16 of an octave, from
    `query . mean + query . code`, one channel and one token at a time."""
    scene = ranked(POLICIES["sentencekv"])
    basis, width = scene.pools.basis, 2 * CHANNELS
    masses = score_blocks(scene.geometry, scene.pools, scene.batch, scene.query[None])
    unit = SCALE * math.log2(math.e) * 16
    for h in range(HEADS):
        z = scene.keys[h] @ basis.key_map[h] - basis.center[h]
        for j in range(BLOCKS):
            page = z[j * N : (j + 1) * N]
            mean = page.mean(0)
            grid = float(mean.abs().max()) / 127
            kept = [round(float(m) / grid) for m in mean]
            for g in range(GROUP):
                y = (scene.head(h, g) @ basis.query_map[h]).tolist()
                step, mean_step = max(map(abs, y[:CHANNELS])) / 15, max(map(abs, y)) / 127
                coarse = sum(round(a / mean_step) * m for a, m in zip(y, kept, strict=True))
                units = []
                for t in range(N):
                    x = [float(page[t, c]) - grid * kept[c] for c in range(CHANNELS)]
                    edge = math.sqrt(sum(v * v for v in x) / CHANNELS)
                    code = [math.copysign(3 if abs(v) >= edge else 1, v) for v in x]
                    scale = sum(v * v for v in x) / sum(c * v for c, v in zip(code, x, strict=True))
                    fine = sum(round(a / step) * c for a, c in zip(y, code, strict=False))
                    units.append(
                        math.floor(unit * mean_step * grid * coarse)
                        + math.floor(unit * step * scale * fine)
                    )
                expected = math.log2(sum(2 ** (u / 16) for u in units))
                top, total = int(masses.tops[0, h, g, j]), int(masses.sums[0, h, g, j])
                found = top / 16 + math.log2(total / 2**22)
                assert found == pytest.approx(expected, abs=0.3)  # scales are bfloat16
    assert scene.geometry.code_width == width


def test_the_default_selects_by_the_groups_mean_probability() -> None:
    scene = ranked(POLICIES["sentencekv"])
    masses = score_blocks(scene.geometry, scene.pools, scene.batch, scene.query[None])
    logs = masses.tops.double() / 16 + (masses.sums.double() / 2**22).log2()
    share = torch.softmax(logs[0] * math.log(2), -1).mean(1)  # [HEADS, BLOCKS]
    scene.pools.page_kept.zero_()
    selection = rank_blocks(scene.geometry, scene.pools, scene.batch, masses)
    for h in range(HEADS):
        history = share[h, SINKS:HISTORY_END]
        best = (history.topk(2).indices + SINKS).sort().values
        assert selection.blocks[0, h].tolist() == best.tolist()
        resident = float(share[h].sum() - history.sum())
        expected = float(share[h, best].sum()) + resident
        assert float(selection.coverage[0, h]) == pytest.approx(expected, abs=0.01)
    before = selection.blocks.clone()
    batch = replace(scene.batch, retention=torch.tensor([1e6]))
    other = replace(masses, tops=masses.tops.flip(-1))
    again = rank_blocks(scene.geometry, scene.pools, batch, other)
    assert torch.equal(again.blocks, before), "whoever was selected stays under a large bonus"


def test_random_has_nothing_to_do_with_keys_and_is_spread_out() -> None:
    one, other = ranked(POLICIES["random"], 0), ranked(POLICIES["random"], 1)
    assert torch.equal(one.scores, other.scores), "keys and queries differ, hashes do not"
    known = one.scores[one.scores.isfinite()]
    assert len(set(known.tolist())) == len(known) and float(known.min()) >= 0
    assert float(known.max()) < 1
