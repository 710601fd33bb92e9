# SPDX-License-Identifier: Apache-2.0
"""CUDA streams without a GPU: what is ordered before what, and which accesses race.

Streams are queues here: work runs in the order of its queue, and a wait orders what follows it
after what the other queue held at that moment. Two accesses of the same thing, one of them a
write, must be ordered by these edges.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import combinations


class FakeStreams:
    """In place of `torch.cuda`: every access is a node, with the nodes it comes after."""

    def __init__(self) -> None:
        self.after: list[set[int]] = []
        self.accesses: list[tuple[str, int, bool]] = []  # kind, id, written
        self.compute = self.current = FakeStream()

    def Event(self):  # noqa: N802
        return FakeEvent()

    def Stream(self, device):  # noqa: N802  # named as in torch.cuda
        return FakeStream()

    def current_stream(self, device):
        return self.current

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def touch(self, kind, ids, written):
        for i in ids:
            node = len(self.after)
            self.after.append(set(self.current.seen))
            self.accesses.append((kind, i if isinstance(i, tuple) else int(i), written))
            self.current.seen.add(node)

    def races(self):
        for a, b in combinations(range(len(self.after)), 2):
            (kind, i, writes), (other_kind, j, other_writes) = self.accesses[a], self.accesses[b]
            conflict = (kind, i) == (other_kind, j) and (writes or other_writes)
            if conflict and a not in self.after[b]:
                yield self.accesses[a], self.accesses[b]


class FakeStream:
    def __init__(self) -> None:
        self.seen: set[int] = set()

    def wait_stream(self, other):
        self.seen |= other.seen

    def wait_event(self, event):
        self.seen |= event.seen


class FakeEvent:
    """Until it is recorded, nobody waits for it."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def record(self, stream):
        self.seen = set(stream.seen)
