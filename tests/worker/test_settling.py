# SPDX-License-Identifier: Apache-2.0
"""Settlement carried out: what is compacted is what attention then sees."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from small_runtime import BLOCKS, GEOMETRY, GROUP, HEADS, D, N, attend, make_runtime, options, rows

from sentencekv_vllm.messages import ObservedRows, RequestUpdate, SettledPrompt, StepMessage
from sentencekv_vllm.ops.votes import count_votes, elect_tokens
from sentencekv_vllm.types import Fate, Settlement

PROMPT, LO, HI, BUDGET = 77, 1, 8, 3  # tokens; blocks
VOTES = Settlement(Fate.COMPACT, window=6, kernel=3)


def settled(slot, blocks, private, votes=VOTES) -> RequestUpdate:
    prompt = SettledPrompt(votes, blocks, PROMPT, LO, HI, BUDGET)
    none = np.empty(0, np.int32)
    chosen = options(settlement=votes, budget_blocks=BUDGET, block_groups=True)
    return RequestUpdate(slot, chosen, [], [], [], none, private, prompt)


def observe(runtime, slot, generator) -> torch.Tensor:
    """A prefill of one request in two chunks, the window split between them: its queries."""
    query = torch.randn(2, VOTES.window, HEADS * GROUP, D, generator=generator)
    for place, count in ((0, 2), (2, 4)):
        ones = np.ones(1, np.int32)
        message = StepMessage(
            runtime._step + 1,
            observed=ObservedRows(
                slot * ones, 9 * ones, (count - 1) * ones, count * ones, place * ones, ["r"]
            ),
        )
        runtime.apply(message)
        observed = runtime.observed(
            torch.tensor([0] * 4 + [9 * N] * count), torch.tensor([3 + count])
        )
        for layer in range(2):
            batch = torch.zeros(4 + count, HEADS * GROUP, D)
            batch[4:] = query[layer, place : place + count]
            runtime.observations.put(layer, batch, observed)
    return query


def tokens_of(cache, blocks, head):
    """K and V of a request's tokens; the layout is that of `make_runtime`."""
    flat = cache[torch.tensor(blocks), head].flatten(1)
    return flat[:, : N * D].reshape(-1, D), flat[:, N * D :].reshape(-1, D)


def expected_output(cache, blocks, window, query, length) -> torch.Tensor:
    """Attention of one token to sinks, elected tokens and recent tokens, head by head."""
    outputs = []
    for h in range(HEADS):
        keys, values = tokens_of(cache, blocks, h)
        group = slice(h * GROUP, (h + 1) * GROUP)
        votes = count_votes(window[:, group], keys[:PROMPT], GEOMETRY.scale, VOTES)
        kept = elect_tokens(votes[LO * N : HI * N], BUDGET * N) + LO * N
        seen = torch.cat((torch.arange(LO * N), kept, torch.arange(HI * N, length)))
        logits = GEOMETRY.scale * query[group] @ keys[seen].T
        outputs.append(logits.softmax(-1) @ values[seen])
    return torch.cat(outputs)


def test_attention_sees_the_elected_tokens_where_two_requests_trade_blocks():
    runtime = make_runtime(working_set=5)
    generator = torch.Generator().manual_seed(2)
    first, second = list(range(1, 11)), list(range(11, 21))
    # Each is given blocks that the other has freed in the same step.
    private = {0: second[LO : LO + BUDGET], 2: first[LO : LO + BUDGET]}
    windows = {slot: observe(runtime, slot, generator) for slot in (0, 2)}
    before = [pools.cache.clone() for pools in runtime.pools.layers]
    updates = [settled(0, first, private[0]), settled(2, second, private[2])]
    sparse = rows([0, 2], [first[-1], second[-1]], hi=HI)
    sparse.seq_lens[:] = PROMPT
    runtime.apply(StepMessage(runtime._step + 1, [], updates, sparse, frees=True))
    (plan,) = runtime.plan(
        block_table=torch.tensor([first, second], dtype=torch.int32),
        slot_mapping=torch.tensor([first[-1], second[-1]]) * N + 3,
        last_tokens=torch.arange(2),
    )
    for layer in range(2):
        query = torch.randn(2, HEADS * GROUP, D, generator=generator)
        output = attend(runtime, plan, layer, query)
        for row, (slot, blocks) in enumerate(((0, first), (2, second))):
            wanted = expected_output(
                before[layer], blocks, windows[slot][layer], query[row], PROMPT
            )
            torch.testing.assert_close(output[row], wanted, rtol=1e-4, atol=1e-5)
    report = runtime.take_report()
    assert not report.hits.any() and not report.misses.any()
    assert np.isnan(report.coverage).all(), "nobody estimated it"


def test_layers_of_a_group_share_the_choice_of_the_first():
    votes = Settlement(Fate.COMPACT, window=6, kernel=3, layer_group=2)
    runtime = make_runtime(working_set=5)
    window = observe(runtime, 0, torch.Generator().manual_seed(3))
    blocks, private = list(range(1, 11)), [30, 31, 32]
    before = [pools.cache.clone() for pools in runtime.pools.layers]
    sparse = rows([0], [blocks[-1]], hi=HI)
    runtime.apply(StepMessage(runtime._step + 1, [], [settled(0, blocks, private, votes)], sparse))
    assert max(private) < BLOCKS
    for h in range(HEADS):
        keys, _ = tokens_of(before[0], blocks, h)
        group = slice(h * GROUP, (h + 1) * GROUP)
        scores = count_votes(window[0][:, group], keys[:PROMPT], GEOMETRY.scale, votes)
        kept = elect_tokens(scores[LO * N : HI * N], BUDGET * N) + LO * N
        for layer, pools in enumerate(runtime.pools.layers):
            for moved, source in zip(
                tokens_of(pools.cache, private, h), tokens_of(before[layer], blocks, h), strict=True
            ):
                assert torch.equal(moved, source[kept])


SENTENCES = [5, 11, 14, 25, 33, 36, 47, 60, PROMPT]


def test_sentences_are_kept_whole_and_the_last_one_is_cut():
    votes = Settlement(Fate.COMPACT, window=6, kernel=1, unit=None)
    runtime = make_runtime(working_set=5)
    window = observe(runtime, 0, torch.Generator().manual_seed(7))
    blocks, private = list(range(1, 11)), [30, 31, 32]
    before = [pools.cache.clone() for pools in runtime.pools.layers]
    ends = np.array(SENTENCES, np.int32)
    update = replace(settled(0, blocks, private, votes), sentence_ends=ends)
    sparse = rows([0], [blocks[-1]], hi=HI)
    runtime.apply(StepMessage(runtime._step + 1, [], [update], sparse))
    spans = [  # of the history
        range(max(a, LO * N), min(b, HI * N))
        for a, b in pairwise([0, *SENTENCES])
        if b > LO * N and a < HI * N
    ]
    for layer, pools in enumerate(runtime.pools.layers):
        for h in range(HEADS):
            keys, _ = tokens_of(before[layer], blocks, h)
            group = slice(h * GROUP, (h + 1) * GROUP)
            scores = count_votes(window[layer][:, group], keys[:PROMPT], GEOMETRY.scale, votes)
            kept: list[int] = []
            for span in sorted(
                spans, key=lambda span: -float(scores[span.start : span.stop].sum())
            ):
                kept += list(span)[: BUDGET * N - len(kept)]
            for moved, source in zip(
                tokens_of(pools.cache, private, h), tokens_of(before[layer], blocks, h), strict=True
            ):
                assert torch.equal(moved, source[sorted(kept)])


def test_a_sentence_that_retained_nothing_is_barred_and_the_others_are_means_of_what_they_kept():
    votes = Settlement(Fate.RETAIN, window=6, kernel=3, factor=0.5)
    runtime = make_runtime(working_set=5)
    window = observe(runtime, 0, torch.Generator().manual_seed(4))
    blocks, pages = list(range(1, 11)), list(range(20, 30))
    ends = np.arange(5, 10 * N + 1, 5, dtype=np.int32)
    prompt = SettledPrompt(votes, blocks, PROMPT, LO, HI, BUDGET)
    chosen = options(settlement=votes, budget_blocks=BUDGET, index_kind=1)
    update = RequestUpdate(0, chosen, blocks, pages, pages, ends, [40, 41, 42, 43, 44], prompt)
    runtime.apply(StepMessage(runtime._step + 1, [], [update], rows([0], [10], hi=HI)))
    sentence_rows, indexed_ends = runtime.tables.indexed_sentences(0)
    count = round(votes.factor * BUDGET * N)
    for layer, pools in enumerate(runtime.pools.layers):
        for h in range(HEADS):
            keys, _ = tokens_of(pools.cache, blocks, h)
            group = slice(h * GROUP, (h + 1) * GROUP)
            scores = count_votes(window[layer][:, group], keys[:PROMPT], GEOMETRY.scale, votes)
            kept = set((elect_tokens(scores[LO * N :], count) + LO * N).tolist())
            start, barred = 0, 0
            for row, end in zip(sentence_rows.tolist(), indexed_ends.tolist(), strict=True):
                mine = [t for t in range(start, end) if t in kept]
                centroid = pools.centroids[row, h]
                if mine:
                    torch.testing.assert_close(centroid, keys[mine].mean(0).bfloat16())
                else:
                    assert centroid.isnan().all()
                    barred += 1
                start = end
            assert 0 < barred < len(sentence_rows)


def test_clustered_pages_hold_the_same_tokens_and_the_means_of_what_they_hold():
    """With room for the whole history the output is that of dense attention in any order."""
    clustering = Settlement(Fate.CLUSTER, window=0, cluster_tokens=10)
    everything = HI - LO
    runtime = make_runtime(working_set=everything)
    blocks, pages = list(range(1, 11)), list(range(20, 30))
    ends = np.arange(N, 10 * N + 1, N, dtype=np.int32)
    prompt = SettledPrompt(clustering, blocks, PROMPT, LO, HI, everything)
    chosen = options(
        settlement=clustering,
        budget_blocks=everything,
        index_kind=1,
        block_groups=True,
        estimates=True,
    )
    private = [*range(40, 40 + everything)]
    update = RequestUpdate(0, chosen, blocks, pages, pages, ends, private, prompt)
    before = [pools.cache.clone() for pools in runtime.pools.layers]
    sparse = rows([0], [blocks[-1]], hi=HI)
    sparse.seq_lens[:] = PROMPT
    runtime.apply(StepMessage(runtime._step + 1, [], [update], sparse, frees=True))
    history = slice(LO * N, HI * N)
    moved = 0
    for layer, pools in enumerate(runtime.pools.layers):
        assert torch.equal(pools.cache, before[layer]), "the prefix cache may still want the blocks"
        for h in range(HEADS):
            keys, values = tokens_of(before[layer], blocks, h)
            page_keys, page_values = tokens_of(pools.host, pages[LO:HI], h)
            source = (page_keys[:, None] == keys[history]).all(-1).float().argmax(1)
            assert sorted(source.tolist()) == list(range(everything * N)), "each token once"
            assert torch.equal(page_values, values[history][source]), "K and V move together"
            moved += int((source != torch.arange(everything * N)).sum())
            table = runtime.tables.indexed_sentences(0)[0][LO:HI].tolist()
            means = page_keys.view(everything, N, D).mean(1).bfloat16()
            torch.testing.assert_close(pools.centroids[table, h], means)
            means = page_values.view(everything, N, D).mean(1).bfloat16()
            torch.testing.assert_close(pools.spreads[table, h], means)
    assert moved > 0
    (plan,) = runtime.plan(
        block_table=torch.tensor([blocks], dtype=torch.int32),
        slot_mapping=torch.tensor([blocks[-1]]) * N + 3,
        last_tokens=torch.zeros(1, dtype=torch.int64),
    )
    query = torch.randn(1, HEADS * GROUP, D, generator=torch.Generator().manual_seed(5))
    output = attend(runtime, plan, 1, query)[0]
    for h in range(HEADS):
        keys, values = (t[:PROMPT] for t in tokens_of(before[1], blocks, h))
        group = slice(h * GROUP, (h + 1) * GROUP)
        dense = (GEOMETRY.scale * query[0, group] @ keys.T).softmax(-1) @ values
        torch.testing.assert_close(output[group], dense, rtol=1e-4, atol=1e-5)
