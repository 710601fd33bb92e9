# SPDX-License-Identifier: Apache-2.0
"""Copy-out on a side stream never races with the forward, whatever is reused when.

Two accesses of the same block or page, one of them a write, must be ordered: see `fake_streams`.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from sentencekv_vllm.messages import DecodeOptions, RequestUpdate, SparseRows, StepMessage
from sentencekv_vllm.ops.token_layout import TokenLayout
from sentencekv_vllm.types import Geometry
from sentencekv_vllm.worker.copy_stream import SideStream
from sentencekv_vllm.worker.runtime import Runtime

from .fake_streams import FakeStreams

N, BLOCKS, PAGES = 8, 40, 12
GEOMETRY = Geometry(
    num_layers=1, num_kv_heads=1, group_size=1, head_dim=8, block_size=N, rows_per_page=1, scale=1.0
)
OPTIONS = DecodeOptions(
    index_kind=0, reduce=0, retention=0.0, query_kind=0, budget_blocks=1, seed=0
)


class RecordingOps:
    """Notes which blocks and pages an op touches, and on which stream."""

    name = "recording"

    def __init__(self, streams: FakeStreams) -> None:
        self.streams = streams

    def index_pages(self, pools, block_ids, page_ids, *_):
        self.streams.touch("block", block_ids, written=False)
        self.streams.touch("page", page_ids, written=True)

    def index_sentences(self, pools, rows, *_):
        self.streams.touch("row", rows, written=True)

    def set_step(self, step):
        pass

    def begin_step(self, batch):
        pass

    def decode_layer(self, geometry, pools, batch, query, out):
        for s in range(len(batch.num_pages)):
            self.streams.touch("page", batch.pages[s, : batch.num_pages[s]], written=False)
            self.streams.touch("row", batch.row_pages[s, : batch.num_sentences[s]], written=False)

    def reuse_selection(self, pools, batch, out):
        for s in range(len(batch.num_pages)):
            self.streams.touch("page", batch.pages[s, : batch.num_pages[s]], written=False)


class Engine:
    """Steps of a runtime, and the forward that each is followed by."""

    def __init__(self, copies=None) -> None:
        self.streams = FakeStreams()
        self.step = 0
        self.runtime = Runtime(
            GEOMETRY,
            [torch.zeros(BLOCKS, 1, N, 16)],
            TokenLayout.rows(N, 8, torch.device("cpu")),
            num_pages=PAGES,
            num_slots=4,
            working_set_blocks=1,
            ops=RecordingOps(self.streams),
            layer_names=["layer"],
            copies=copies or SideStream(torch.device("cpu"), self.streams),
        )

    def run(self, *updates, writes=(), sparse=(), dropped=(), frees=False):
        """One step: its message, then a forward that writes blocks and decodes slots."""
        self.step += 1
        rows = None
        if sparse:
            slots = np.asarray(sparse, np.int32)
            rows = SparseRows(
                slots,
                30 + slots,
                0 * slots,
                1 + 0 * slots,
                N + 1 + 0 * slots,
                np.zeros(len(slots), np.bool_),
                [str(slot) for slot in sparse],
            )
        self.runtime.apply(StepMessage(self.step, list(dropped), list(updates), rows, frees))
        self.streams.touch("block", writes, written=True)
        if sparse:
            self.runtime.set_batch_order([str(slot) for slot in sparse])
            table = torch.zeros(len(sparse), 4, dtype=torch.int32)
            (plan,) = self.runtime.plan(table, torch.empty(0), torch.arange(len(sparse)))
            self.runtime.rank(plan, 0, torch.zeros(len(sparse), 1, 8))
        self.runtime.take_report()


def copies(slot, blocks, pages, private=None, first=True):
    ends = np.asarray([N * (i + 1) for i in range(len(blocks))] if first else [], np.int32)
    return RequestUpdate(
        slot, OPTIONS if first else None, [*blocks], [*pages], [*pages], ends, private
    )


def life_of_two_requests(engine):
    """One turns sparse, its blocks and later its pages go to another that does, too."""
    engine.run(writes=[1, 2, 3])  # prefill
    engine.run(copies(0, [1, 2], [0, 1]), writes=[4])  # copied beside the next chunk
    engine.run(copies(0, [3], [2], private=[9], first=False), sparse=[0], frees=True, writes=[1])
    engine.run(writes=[2, 3], sparse=[0])  # freed blocks, written by another's prefill
    # The first one ends: its pages go to the second in the next message, in flight or not.
    engine.run(copies(1, [1, 2, 3], [2, 0, 1]), dropped=[0], writes=[5])
    engine.run(copies(1, [5], [3], private=[8], first=False), sparse=[1], frees=True, writes=[1])
    # Later history moves on and frees a block that was copied a step before.
    engine.run(copies(1, [6], [4], first=False))
    engine.run(frees=True, writes=[6])


def test_no_reuse_of_blocks_pages_or_rows_races():
    engine = Engine()
    life_of_two_requests(engine)
    assert not list(engine.streams.races())


def test_copies_run_beside_a_forward_that_needs_nothing_of_them():
    engine = Engine()
    engine.run(writes=[1, 2])
    engine.run(copies(0, [1, 2], [0, 1]), writes=[3])
    streams = engine.streams
    copy = streams.accesses.index(("page", 0, True))
    chunk = streams.accesses.index(("block", 3, True))
    assert copy not in streams.after[chunk] and chunk not in streams.after[copy]


def test_a_copy_of_a_request_that_has_ended_spoils_no_page():
    engine = Engine()
    engine.run(writes=[1])
    engine.run(copies(0, [1], [0]), writes=[2])
    engine.run(copies(1, [2], [0]), dropped=[0], writes=[1])  # no wait: block 1 is written
    engine.run(copies(1, [3], [1], private=[9], first=False), sparse=[1], frees=True)
    assert {kind for (kind, *_), _ in engine.streams.races()} == {"block"}


class NoFirstWait(SideStream):
    @contextmanager
    def writing(self):
        with self._streams.stream(self._side):
            yield


class NoJoin(SideStream):
    def join(self):
        return None


@pytest.mark.parametrize("broken", [NoFirstWait, NoJoin])
def test_each_rule_is_needed(broken):
    engine = Engine()
    engine.runtime._copies = broken(torch.device("cpu"), engine.streams)
    life_of_two_requests(engine)
    assert list(engine.streams.races())
