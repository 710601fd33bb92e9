# SPDX-License-Identifier: Apache-2.0
"""Facts of a step's rows are those of the tables, whatever was looked up before."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch

from sentencekv_vllm.worker.slot_facts import LatestSlotFacts, SlotFacts

from .test_device_planner import Request, make_runtime


def plain(facts):
    record = asdict(facts)
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in record.items()} | {
        "columns": {name: column.tolist() for name, column in facts.columns.items()}
    }


@pytest.fixture
def tables():
    tables = make_runtime(persistent=False).tables
    for slot in range(3):
        tables.apply(Request(slot, 4 + slot, torch.Generator().manual_seed(slot)).update())
    return tables


def test_looked_up_once_for_the_same_rows(tables):
    latest, slots = LatestSlotFacts(tables), np.array([0, 2], np.int32)
    assert latest(slots) is latest(slots.copy())


def test_rows_that_change_places_are_others(tables):
    latest = LatestSlotFacts(tables)
    for slots in ([0, 1, 2], [2, 1, 0], [1], [0, 1, 2]):
        slots = np.array(slots, np.int32)
        assert plain(latest(slots)) == plain(SlotFacts.of(tables, slots))


def test_what_a_request_gains_is_seen(tables):
    latest, slots = LatestSlotFacts(tables), np.array([0, 1], np.int32)
    before = latest(slots)
    request = Request(1, 9, torch.Generator().manual_seed(1))
    request.copied = 4
    tables.apply(request.update())
    after = latest(slots)
    assert after.max_pages > before.max_pages
    assert plain(after) == plain(SlotFacts.of(tables, slots))


def test_the_next_owner_of_a_slot_has_its_own(tables):
    latest, slots = LatestSlotFacts(tables), np.array([0], np.int32)
    latest(slots)
    tables.drop(0)
    assert latest(slots).max_pages == 0
    tables.apply(Request(0, 7, torch.Generator().manual_seed(5)).update())
    assert plain(latest(slots)) == plain(SlotFacts.of(tables, slots))
