# SPDX-License-Identifier: Apache-2.0
"""What goes through one buffer comes out as it went in."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sentencekv_vllm.worker.transfer import (
    ALIGNMENT,
    STAGING_TURNS,
    Packing,
    Staging,
    Tallies,
    Totals,
    upload,
    upload_packed,
)

CPU = torch.device("cpu")
DTYPES = (torch.int64, torch.int32, torch.float32, torch.bool, torch.uint8)
SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple)


@given(st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=6))
def test_packed_arrays_are_the_same_and_aligned(kinds):
    generator = torch.Generator().manual_seed(len(kinds))
    tensors = [torch.randint(0, 99, s, generator=generator).to(dtype) for s, dtype in kinds]
    packed = upload_packed(tensors, CPU)
    for sent, received in zip(tensors, packed, strict=True):
        assert received.dtype == sent.dtype and torch.equal(received, sent)
        assert received.storage_offset() * received.itemsize % ALIGNMENT == 0


def test_nothing_is_packed_twice_into_one_place():
    packing = Packing([((3,), torch.int32), ((2,), torch.int64), ((5,), torch.bool)])
    buffer = torch.zeros(packing.num_bytes, dtype=torch.uint8)
    for i, view in enumerate(packing.views(buffer)):
        view.fill_(i + 1)
    assert [view.tolist() for view in packing.views(buffer)] == [[1] * 3, [2] * 2, [True] * 5]


def test_arrays_are_views_without_torch():
    packing = Packing([((3,), torch.int32), ((2, 2), torch.float32), ((5,), torch.bool)])
    buffer = torch.zeros(packing.num_bytes, dtype=torch.uint8)
    for i, array in enumerate(packing.arrays(buffer)):
        array[...] = i + 1
    for view, array in zip(packing.views(buffer), packing.arrays(buffer), strict=True):
        assert view.numpy().dtype == array.dtype and view.tolist() == array.tolist()


def test_filling_a_step_leaves_those_alone_that_may_still_be_copied():
    """What a queued copy reads: memory, some steps later."""
    packing = Packing([((2,), torch.int64)])
    staging, queued = Staging(packing, CPU), []
    for step in range(3 * STAGING_TURNS):
        (array,) = staging.next()
        array[:] = step
        target = torch.zeros(packing.num_bytes, dtype=torch.uint8)
        staging.send(target)
        assert packing.views(target)[0].tolist() == [step, step]
        queued.append((step, array))
        assert all((a == s).all() for s, a in queued[-(STAGING_TURNS - 1) :])


def test_on_the_cpu_tables_are_shared_and_not_copied():
    array = np.arange(4, dtype=np.int32)
    (tensor,) = upload([array], CPU)
    array[0] = 9
    assert tensor[0] == 9


def test_totals_start_at_zero_and_are_read_back_per_name():
    totals = Totals(3, 4, CPU)
    tallies = Tallies(totals, 3)
    assert not any(array.any() for array in tallies.fetched())
    totals.hits += 1
    totals.misses[1] = 7
    totals.stage_ns += 2
    totals.coverage += 0.5
    tallies.start_fetch()
    hits, misses, stage_ns, coverage = tallies.fetched()
    assert hits.tolist() == [1, 1, 1] and misses.tolist() == [0, 7, 0]
    assert stage_ns.tolist() == [2] * 4 and coverage.tolist() == [0.5] * 3


def test_tallies_of_shared_totals_are_those_of_their_step_and_their_rows():
    totals = Totals(4, 1, CPU)
    first = Tallies(totals, 2, shared=True)
    totals.hits += 5
    first.start_fetch()
    totals.zero()
    totals.hits += 8
    assert first.fetched()[0].tolist() == [5, 5]
    assert Tallies(totals, 4, shared=True).fetched()[0].tolist() == [8] * 4
