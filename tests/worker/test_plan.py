# SPDX-License-Identifier: Apache-2.0
"""I6: tables hold sinks and recent blocks always, and no column of a freed block."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sentencekv_vllm.worker.plan import head_tables, table_width

BLOCK, STALE, PRIVATE = 32, 10_000, 20_000


def tables_of(table, batch, tokens, num_kv_heads):
    rows = SimpleNamespace(
        history_lo=batch.history_lo.numpy(),
        history_hi=batch.history_hi.numpy(),
        seq_lens=tokens.numpy(),
    )
    width = table_width(rows, batch.budget_blocks.numpy(), BLOCK)
    lo, hi, budget = batch.history_lo, batch.history_hi, batch.budget_blocks
    private = torch.arange(PRIVATE, PRIVATE + max(1, int(budget.max()))).expand(len(lo), -1).int()
    return head_tables(table, private, lo, hi, budget, tokens, width, BLOCK, num_kv_heads)


@st.composite
def rows(draw):
    """(sink blocks, history end, budget, tokens) of some requests."""
    requests = []
    for _ in range(draw(st.integers(1, 5))):
        lo = draw(st.integers(0, 3))
        hi = lo + draw(st.integers(0, 40))
        budget = draw(st.integers(0, hi - lo))
        tokens = hi * BLOCK + draw(st.integers(1, 5 * BLOCK))
        requests.append((lo, hi, budget, tokens))
    return requests


@settings(deadline=None)
@given(rows(), st.integers(1, 4))
def test_tables_are_sinks_then_room_for_the_choice_then_recent_blocks(requests, num_kv_heads):
    lo, hi, budget, tokens = (
        torch.tensor(c, dtype=torch.int32) for c in zip(*requests, strict=True)
    )
    widest = max(-(-t // BLOCK) for *_, t in requests)
    table = torch.full((len(requests), widest + 3), STALE, dtype=torch.int32)
    for s, (first, end, _, count) in enumerate(requests):
        own = torch.arange(-(-count // BLOCK)) + 100 * (s + 1)
        table[s, : len(own)] = own
        table[s, first:end] = STALE  # freed; another request's by now
    batch = SimpleNamespace(history_lo=lo, history_hi=hi, budget_blocks=budget)
    result, lengths = tables_of(table, batch, tokens, num_kv_heads)
    for s, (first, end, room, count) in enumerate(requests):
        own = table[s].tolist()
        blocks = -(-count // BLOCK)
        expected = [*own[:first], *range(PRIVATE, PRIVATE + room), *own[end:blocks]]
        assert lengths[s] == count - (end - first - room) * BLOCK
        assert -(-int(lengths[s]) // BLOCK) == len(expected)
        for h in range(num_kv_heads):
            ids = result[s, h, : len(expected)]
            assert (ids % num_kv_heads == h).all()
            assert (ids // num_kv_heads).tolist() == expected
    assert not (result // num_kv_heads == STALE).any(), "freed columns are never read"


def test_the_partly_filled_block_is_last():
    one = torch.ones(1, dtype=torch.int32)
    batch = SimpleNamespace(history_lo=one, history_hi=5 * one, budget_blocks=2 * one)
    table = torch.arange(10, 20, dtype=torch.int32)[None]
    tables, lengths = tables_of(table, batch, 200 * one, 1)
    assert tables.tolist() == [[[10, PRIVATE, PRIVATE + 1, 15, 16]]]
    assert lengths.item() == 200 - 2 * BLOCK == 4 * BLOCK + 8, "eight tokens in block 16"


@pytest.mark.parametrize("tokens", [161, 192])
def test_a_budget_of_nothing_leaves_sinks_and_recent_window(tokens):
    one = torch.ones(1, dtype=torch.int32)
    batch = SimpleNamespace(history_lo=one, history_hi=5 * one, budget_blocks=0 * one)
    table = torch.arange(10, 20, dtype=torch.int32)[None]
    tables, lengths = tables_of(table, batch, tokens * one, 1)
    assert tables.tolist() == [[[10, 15]]]
    assert lengths.item() == tokens - 4 * BLOCK
