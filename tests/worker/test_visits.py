# SPDX-License-Identifier: Apache-2.0
"""A layer attends to its own history, whatever stages it: places, tables and streams."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sentencekv_vllm.messages import VisitRows
from sentencekv_vllm.types import Geometry
from sentencekv_vllm.worker.pools import Pools
from sentencekv_vllm.worker.tables import Tables
from sentencekv_vllm.worker.visit_stream import VisitSideStream, VisitsInProgramOrder
from sentencekv_vllm.worker.visits import Visits, staged_blocks, whole_cache

from .fake_streams import FakeStreams

L, B, N, P = 5, 30, 4, 40
CPU = torch.device("cpu")
GEOMETRY = Geometry(
    num_layers=L, num_kv_heads=1, group_size=1, head_dim=8, block_size=N, rows_per_page=1, scale=1.0
)
NAMES = [f"layer {i}" for i in range(L)]


def caches(order=range(L)):
    whole = torch.full((L, B, 1, N, 16), float("nan"))
    return [whole[i] for i in order]


def make(stream, order=range(L)):
    """Two visitors in slots 0 and 2; page p of layer l holds the number 100 l + p."""
    layers = caches(order)
    pools = Pools(GEOMETRY, P, layers)
    for layer in range(L):
        for page in range(P):
            pools.host[layer, page] = 100 * layer + page
    tables = Tables(3, 1, N, 1)
    tables.pages.append(0, [*range(12)])
    tables.pages.append(2, [*range(20, 35)])
    tables.staging = {0: np.asarray([7, 3, 9, 11], np.int32), 2: np.arange(20, 27, dtype=np.int32)}
    return Visits(pools, tables, layers, stream, NAMES), layers


def rows():
    def column(*values):
        return np.asarray(values, np.int32)

    return VisitRows(column(0, 2), column(1, 2), column(1, 2), column(10, 15), ["a", "b"])


TABLE = torch.arange(3 * 16, dtype=torch.int32).view(3, 16) % B


@pytest.mark.parametrize("order", [range(L), (4, 0, 3, 1, 2)])
@pytest.mark.parametrize("stream", ["program order", "two halves"])
def test_each_layer_finds_its_own_history_and_its_own_blocks(stream, order):
    on_side = VisitSideStream(CPU, L, FakeStreams())
    visits, layers = make(VisitsInProgramOrder() if stream == "program order" else on_side, order)
    for layer in layers:
        layer[12:20] = 1000.0  # blocks of others
    visits.begin(rows(), np.asarray([2, 0]), TABLE)
    for layer in range(L):
        table = visits.table(layer)
        for row, pages, lo, hi in ((2, [*range(12)], 1, 10), (0, [*range(20, 35)], 2, 15)):
            content = visits.whole[table[row, lo:hi].long()][:, 0, 0, 0]
            assert content.tolist() == [100 * layer + page for page in pages[lo:hi]]
            stay = [j for j in range(16) if not lo <= j < hi]
            own = layers[layer][TABLE[row, stay].long()]
            assert torch.equal(visits.whole[table[row, stay].long()].nan_to_num(), own.nan_to_num())
        assert torch.equal(table[1], TABLE[1] + (table[1, 0] - TABLE[1, 0]))
        visits.leave(layer)
    for layer in layers:
        assert (layer[12:20] == 1000.0).all(), "others' blocks are untouched"
    assert visits.take_bytes() == L * (9 + 13) * N * 16 * 4 and visits.take_bytes() == 0


@given(st.integers(1, 6), st.integers(1, 2), st.data())
def test_places_are_distinct_private_and_stay(layers, halves, data):
    count = data.draw(st.integers(1, 40))
    private = -(-halves * count // layers)
    staging = np.random.default_rng(0).permutation(100)[:private].astype(np.int32)
    places = [staged_blocks(staging, count, half, halves, (layers, 100)) for half in range(halves)]
    everything = np.concatenate(places)
    assert len(set(everything.tolist())) == halves * count
    assert set((everything % 100).tolist()) <= set(staging.tolist())
    assert everything.max() < layers * 100
    fewer = data.draw(st.integers(1, count))
    assert np.array_equal(
        staged_blocks(staging, fewer, 0, halves, (layers, 100)), places[0][:fewer]
    )


def test_layers_that_lie_apart_cannot_be_one_cache():
    whole, first = whole_cache(caches())
    assert whole.shape == (L * B, 1, N, 16) and first == [i * B for i in range(L)]
    apart = [torch.zeros(B, 1, N, 16) for _ in range(L)]
    gaps = [*torch.zeros(2 * L, B, 1, N, 16)[::2]]
    for layers in (apart, gaps):
        with pytest.raises(ValueError, match='"visits": false'):
            whole_cache(layers)


class Recorder:
    """A step of visits on fake streams: which staging blocks are read and written, and when."""

    def __init__(self, stream_type=VisitSideStream):
        self.streams = FakeStreams()
        self.visits, _ = make(stream_type(CPU, L, self.streams))
        self.visits._stage = self.stage

    def stage(self, host, cache, pairs):
        self.streams.touch("page", pairs[:, 0], written=False)
        self.streams.touch("block", pairs[:, 1], written=True)

    def step(self, frees=()):
        self.streams.touch("page", range(P), written=True)  # copy-out, joined
        self.visits.begin(rows(), np.asarray([2, 0]), TABLE)
        for layer in range(L):
            table = self.visits.table(layer)
            self.streams.touch("block", table[2, 1:10].tolist(), written=False)
            self.streams.touch("block", table[0, 2:15].tolist(), written=False)
            self.visits.leave(layer)
        self.streams.touch("block", range(L * B), written=True)  # the next step's owners


def test_no_copy_races_with_an_attention_or_with_the_next_owner():
    recorder = Recorder()
    recorder.step()
    recorder.step()
    assert not list(recorder.streams.races())


def test_copies_of_a_layer_overlap_with_the_attention_before_it():
    recorder = Recorder()
    recorder.step()
    streams = recorder.streams
    reads = [i for i, (kind, _, w) in enumerate(streams.accesses) if kind == "block" and not w]
    writes = [i for i, (kind, _, w) in enumerate(streams.accesses) if kind == "block" and w]
    assert any(r > w and w not in streams.after[r] for r in reads for w in writes)


class NoStart(VisitSideStream):
    def start(self):
        return None


class NoWait(VisitSideStream):
    def wait(self, layer):
        return None


class NoRead(VisitSideStream):
    def read(self, layer):
        return None


@pytest.mark.parametrize("broken", [NoStart, NoWait, NoRead])
def test_each_rule_is_needed(broken):
    recorder = Recorder(broken)
    recorder.step()
    recorder.step()
    assert list(recorder.streams.races())
