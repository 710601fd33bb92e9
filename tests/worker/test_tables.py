# SPDX-License-Identifier: Apache-2.0
"""Updates in pieces give the tables of one update, and every sentence is indexed once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sentencekv_vllm.messages import DecodeOptions, RequestUpdate, SparseRows
from sentencekv_vllm.worker.planner import attended_blocks
from sentencekv_vllm.worker.tables import Tables

BLOCK, ROWS = 4, 2
OPTIONS = DecodeOptions(
    index_kind=1, reduce=2, retention=5.0, query_kind=1, budget_blocks=6, seed=11
)


def update(slot=0, blocks=(), pages=(), row_pages=(), ends=(), private=None, options=None):
    return RequestUpdate(
        slot, options, [*blocks], [*pages], [*row_pages], np.asarray(ends, np.int32), private
    )


def rows_of(slot, lo=1, hi=9):
    one = np.ones(1, np.int32)
    return SparseRows(
        slot * one, 77 * one, lo * one, hi * one, hi * BLOCK * one, np.zeros(1, np.bool_)
    )


@st.composite
def requests(draw):
    """Blocks, their pages, sentences, and a way to send them in pieces."""
    num_blocks = draw(st.integers(1, 90))
    order = draw(st.permutations(range(100)))
    lengths = draw(st.lists(st.integers(1, 11), min_size=1, max_size=150))
    ends = np.cumsum(lengths, dtype=np.int32)
    cuts = sorted(draw(st.lists(st.integers(0, num_blocks), max_size=5)))
    return order[:num_blocks], ends, [0, *cuts, num_blocks]


@settings(deadline=None)
@given(requests())
def test_pieces_index_every_sentence_once_at_its_own_row(request):
    block_ids, ends, cuts = request
    pages = [500 + b for b in block_ids]
    extra = [1000 + i for i in range(len(ends))]  # row pages enough for any sentence length
    tables = Tables(3, 4, BLOCK, ROWS)
    found = []
    for i, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False)):
        first = i == 0
        news = tables.apply(
            update(1, block_ids[a:b], pages[a:b], extra if first else (), ends if first else ())
        )
        if news is not None:
            found += zip(
                news.rows.tolist(), news.spans.tolist(), news.span_blocks.tolist(), strict=True
            )
    complete = [int(e) for e in ends if e <= len(block_ids) * BLOCK]
    assert len(found) == len(complete) == tables.num_indexed[1]
    start = 0
    for i, (end, (row, (offset, length), blocks)) in enumerate(zip(complete, found, strict=True)):
        assert row == extra[i // ROWS] * ROWS + i % ROWS
        assert length == end - start
        touched = [block_ids[j] for j in range(start // BLOCK, (end - 1) // BLOCK + 1)]
        assert [b for b in blocks if b >= 0] == touched
        assert blocks[: len(touched)] == touched and offset == start % BLOCK
        start = end
    assert tables.pages.of(1).tolist() == pages
    assert not tables.pages.counts[[0, 2]].any(), "other slots are untouched"


def test_a_dropped_slot_starts_anew():
    tables = Tables(2, 2, BLOCK, ROWS)
    tables.apply(update(0, [1, 2], [3, 4], [3, 4], [5, 8], [8, 9], OPTIONS))
    tables.drop(0)
    assert tables.num_indexed[0] == 0
    news = tables.apply(update(0, [6], [7], [7], [3]))
    assert news.rows.tolist() == [7 * ROWS]
    assert tables.pages.of(0).tolist() == [7] and tables.ends.of(0).tolist() == [3]


def test_a_batch_is_what_the_updates_said():
    tables = Tables(4, 5, BLOCK, ROWS)
    pages = [*range(20, 32)]
    news = update(2, range(12), pages, pages, [7, 20, 41], [50, 51, 52, 53, 54], OPTIONS)
    tables.apply(news)
    batch = tables.batch(rows_of(2), 9, np.asarray([6]))
    assert batch.pages[0, : batch.num_pages[0]].tolist() == pages
    assert batch.num_sentences.tolist() == [3]
    assert batch.sentence_ends[0, :3].tolist() == [7, 20, 41]
    assert batch.private_blocks.tolist() == [[50, 51, 52, 53, 54]]
    assert batch.budget_blocks.tolist() == [6] and batch.step == 9
    assert (batch.index_kind.item(), batch.reduce.item(), batch.seed.item()) == (1, 2, 11)
    assert batch.retention.item() == pytest.approx(5.0)


def test_the_budget_is_cut_to_the_history():
    tables = Tables(1, 5, BLOCK, ROWS)
    tables.apply(update(0, range(9), range(9), range(9), [9, 36], [50], OPTIONS))
    ((layers, attended),) = attended_blocks(tables, rows_of(0, 1, 4))
    assert layers == range(1) and attended.tolist() == [3]
    assert tables.batch(rows_of(0, 1, 4), 0, attended).budget_blocks.tolist() == [3]


def test_a_batch_is_reused_until_something_changes():
    tables = Tables(1, 5, BLOCK, ROWS)
    tables.apply(update(0, range(9), range(9), range(9), [9, 36], [50], OPTIONS))
    first = tables.batch(rows_of(0), 1, np.asarray([6]))
    again = tables.batch(rows_of(0), 2, np.asarray([6]))
    assert again.pages is first.pages and again.step == 2
    assert tables.batch(rows_of(0, hi=8), 3, np.asarray([6])).history_hi.tolist() == [8]
    tables.apply(update(0, [9], [9], [9]))
    assert tables.batch(rows_of(0, hi=8), 4, np.asarray([6])).num_pages.tolist() == [10]


def test_tables_grow_and_keep_what_they_hold():
    tables = Tables(2, 1, BLOCK, ROWS)
    tables.apply(update(1, [5], [6], [6], [4]))
    for start in range(0, 700, 70):
        tables.apply(update(0, *[range(start, start + 70)] * 3, []))
    assert tables.pages.of(0).tolist() == list(range(700))
    assert tables.pages.of(1).tolist() == [6]
