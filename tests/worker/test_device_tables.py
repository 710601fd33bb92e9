# SPDX-License-Identifier: Apache-2.0
"""The device's tables equal the host's after any life of their requests, by differences alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sentencekv_vllm.messages import DecodeOptions, RequestUpdate
from sentencekv_vllm.worker import device_tables
from sentencekv_vllm.worker.device_tables import DeviceTables
from sentencekv_vllm.worker.tables import Tables

SLOTS, BLOCK, ROWS, WORKING_SET, PAGES, SENTENCES = 3, 4, 2, 2, 20, 24
OPTIONS = DecodeOptions(
    index_kind=0, reduce=0, retention=0.0, query_kind=0, budget_blocks=2, seed=0
)


class Lives:
    """Requests that come, grow and go."""

    def __init__(self):
        cpu = torch.device("cpu")
        self.tables = Tables(SLOTS, WORKING_SET, BLOCK, ROWS)
        self.device = DeviceTables(self.tables, PAGES, SENTENCES, cpu)
        self.next = 100

    def fresh(self, count):
        self.next += count
        return [*range(self.next - count, self.next)]

    def grow(self, slot, pages, sentences):
        tables = self.tables
        pages = min(pages, PAGES - int(tables.pages.counts[slot]))
        sentences = min(sentences, SENTENCES - int(tables.ends.counts[slot]))
        last = int(tables.ends.of(slot)[-1]) if tables.ends.counts[slot] else 0
        first = not tables.pages.counts[slot]
        pages = max(pages, int(first))
        tables.apply(
            RequestUpdate(
                slot,
                OPTIONS if first else None,
                [0] * pages,
                self.fresh(pages),
                self.fresh(pages + sentences),
                np.arange(last + 1, last + 1 + sentences, dtype=np.int32),
                self.fresh(WORKING_SET) if first else None,
            )
        )

    def check(self, slots):
        """A step of those among the slots that have a working set."""
        slots = np.asarray([s for s in slots if self.tables.pages.counts[s]], np.int32)
        self.device.update(slots)
        index = torch.tensor([*slots.tolist(), self.device.null_slot])
        pages, row_pages, ends, private = (
            torch.full((len(index), width), -5, dtype=torch.int32)
            for width in (8, SENTENCES // ROWS, 12, WORKING_SET)
        )
        self.device.gather(index, pages, row_pages, ends, private)
        for i, slot in enumerate(slots):
            for result, table in (
                (pages, self.tables.pages),
                (row_pages, self.tables.row_pages),
                (ends, self.tables.ends),
            ):
                expected = table.of(slot)[: result.shape[1]]
                assert result[i, : len(expected)].tolist() == expected.tolist()
            assert private[i].tolist() == self.tables.private[slot].tolist()
        assert not any(t[-1].any() for t in (pages, row_pages, ends, private))


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["grow", "grow", "drop", "step"]),
        st.integers(0, SLOTS - 1),
        st.integers(0, 9),
        st.integers(0, 9),
    ),
    max_size=25,
)


@settings(deadline=None)
@given(EVENTS)
def test_what_a_step_gathers_is_what_the_host_knows(events):
    lives = Lives()
    for what, slot, pages, sentences in events:
        if what == "grow":
            lives.grow(slot, pages, sentences)
        elif what == "drop":
            lives.tables.drop(slot)
        else:
            lives.check([s for s in range(SLOTS) if s <= slot])
    lives.check([*range(SLOTS)])


@pytest.fixture
def uploads(monkeypatch):
    sizes = []

    def upload(arrays, device):
        sizes.append(len(arrays[0]))
        return original(arrays, device)

    original = device_tables.upload
    monkeypatch.setattr(device_tables, "upload", upload)
    return sizes


def test_only_what_is_new_is_sent(uploads):
    lives, slots = Lives(), np.asarray([1], np.int32)
    lives.grow(1, 5, 6)
    lives.device.update(slots)
    assert uploads == [5 + 11 + 6 + WORKING_SET]
    lives.device.update(slots)
    lives.grow(2, 3, 3)
    lives.device.update(slots)
    assert len(uploads) == 1, "nothing new for this request, nothing sent"
    lives.grow(1, 1, 0)
    lives.device.update(slots)
    assert uploads[1:] == [2], "one page with its rows"
    lives.tables.drop(1)
    lives.grow(1, 2, 1)
    lives.device.update(slots)
    assert uploads[2:] == [2 + 3 + 1 + WORKING_SET], "another request: all of it"
