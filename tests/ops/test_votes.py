# SPDX-License-Identifier: Apache-2.0
"""Settlement by the formula of SnapKV, counted one query and one token at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sentencekv_vllm.ops.token_layout import TokenLayout, read_tokens, write_tokens
from sentencekv_vllm.ops.votes import count_votes, elect_tokens, retained_means
from sentencekv_vllm.policies import POLICIES
from sentencekv_vllm.types import Fate, Settlement

W, G, D, T = 4, 2, 16, 50


def by_hand(query, keys, scale, kernel, largest):
    """Equations 1 and 2 of arXiv 2404.14469 without a tensor operation on tokens."""
    total = len(keys)
    sums = [0.0] * (total - W)
    for g in range(G):
        for w in range(W):
            seen = total - W + w + 1
            logits = [scale * float(query[w, g].double() @ keys[t].double()) for t in range(seen)]
            norm = sum(math.exp(x) for x in logits)
            for t in range(total - W):
                sums[t] += math.exp(logits[t]) / norm / G
    pooled = []
    for t in range(len(sums)):
        near = sums[max(0, t - kernel // 2) : t + kernel // 2 + 1]
        pooled.append(max(near) if largest else sum(near) / kernel)
    return pooled


@pytest.mark.parametrize("max_pool", [False, True])
def test_votes_are_pooled_attention_of_the_window(max_pool):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(W, G, D, generator=generator)
    keys = torch.randn(T, D, generator=generator)
    votes = count_votes(
        query, keys, D**-0.5, Settlement(Fate.COMPACT, window=W, kernel=5, max_pool=max_pool)
    )
    expected = by_hand(query, keys, D**-0.5, 5, max_pool)
    torch.testing.assert_close(votes, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_single_tokens_are_elected_by_their_votes():
    scores = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.0, 0.7])
    assert elect_tokens(scores, 3).tolist() == [1, 3, 5]


def test_windows_are_elected_whole_and_the_last_one_is_cut():
    scores = torch.tensor([0.1, 0.1, 0.1, 0.9, 0.0, 0.2, 0.0, 0.0, 0.3])
    chosen = elect_tokens(scores, 4, torch.arange(9) // 2).tolist()
    assert chosen == sorted(chosen) and chosen == [0, 2, 3, 8], "windows 1, 4 (cut), then 0"


def test_chunkkv_keeps_the_chunks_with_the_largest_sums():
    """Algorithm 1 of arXiv 2502.00299: no pooling, sums over chunks, whole chunks."""
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(W, G, D, generator=generator)
    keys = torch.randn(T + W, D, generator=generator)
    settlement = replace(POLICIES["chunkkv"].settlement, window=W, unit=5)
    attention = by_hand(query, keys, D**-0.5, 1, False)
    sums = [sum(attention[i : i + 5]) for i in range(0, T, 5)]
    best = sorted(sorted(range(len(sums)), key=lambda i: -sums[i])[:3])
    votes = count_votes(query, keys, D**-0.5, settlement)
    kept = elect_tokens(votes, 15, torch.arange(T) // settlement.unit).tolist()
    assert kept == [t for i in best for t in range(5 * i, 5 * i + 5)]


def test_a_sentence_is_the_mean_of_its_retained_keys():
    keys = torch.arange(12.0).view(6, 2)
    means = retained_means(keys, torch.tensor([2, 4, 6]), torch.tensor([0, 1, 5]))
    assert means[0].tolist() == keys[:2].mean(0).tolist()
    assert means[1].isnan().all(), "nothing of it was retained"
    assert means[2].tolist() == keys[5].tolist()


def test_tokens_survive_a_move_between_blocks_of_any_inner_layout():
    blocks, heads, n, d = 9, 2, 8, 4
    generator = torch.Generator().manual_seed(1)
    places = torch.randperm(2 * n * d, generator=generator)
    layout = TokenLayout(places[: n * d].view(n, d), places[n * d :].view(n, d))
    cache = torch.randn(blocks, heads, n, 2 * d, generator=generator)
    before = cache.clone()
    source, target = torch.tensor([3, 1, 5]), torch.tensor([8, 2])
    tokens = torch.stack(
        [torch.randperm(3 * n, generator=generator)[: 2 * n] for _ in range(heads)]
    )
    write_tokens(cache, target, read_tokens(cache, source, tokens, layout), layout)
    for h in range(heads):
        for k in range(2 * n):
            t = int(tokens[h, k])
            old = before[source[t // n], h].flatten()
            new = cache[target[k // n], h].flatten()
            assert torch.equal(new[layout.keys[k % n]], old[layout.keys[t % n]])
            assert torch.equal(new[layout.values[k % n]], old[layout.values[t % n]])
    untouched = [b for b in range(blocks) if b not in (8, 2)]
    assert torch.equal(cache[untouched], before[untouched])
