# SPDX-License-Identifier: Apache-2.0
"""What crosses from the scheduler to the workers, and back, in one engine step.

The worker performs a `StepMessage` before anything of that step writes the KV cache, in
this order: `dropped`, `updates` (copy-outs included), then the forward with `sparse`. So a
block may be freed in the same `schedule()` that orders its copy, without acknowledgement.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .types import Fate, Settlement

Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True)
class DecodeOptions:
    """How one request is decoded once it is sparse."""

    index_kind: int  # types.IndexKind
    reduce: int  # types.Reduce
    retention: float
    query_kind: int  # types.QueryKind
    budget_blocks: int  # head-blocks of history selected per KV head and step
    seed: int
    opening_blocks: int = 0  # where more, those selected for the first token of a sentence
    block_groups: bool = False  # a group is a KV block, not a sentence
    settlement: Settlement | None = None  # at the end of the prefill
    estimates: bool = False  # what is left out of the history
    layer_blocks: tuple[int, ...] = ()  # `budget_blocks` by layer; (): the same in all

    @property
    def smallest_budget(self) -> int:
        """Blocks of the layer that selects the fewest."""
        return min(self.layer_blocks, default=self.budget_blocks)

    @property
    def largest_budget(self) -> int:
        """Blocks of the layer that selects the most."""
        return max(self.layer_blocks, default=self.budget_blocks)

    @property
    def unranked(self) -> bool:
        """No step has to choose: what is attended to is compacted, or nothing of the history."""
        return self.compacts or not self.budget_blocks

    @property
    def compacts(self) -> bool:
        """The budget's blocks are filled once; nothing is ranked or swapped in any more."""
        return self.settlement is not None and self.settlement.fate is Fate.COMPACT


@dataclass(frozen=True)
class SettledPrompt:
    """A prompt whose history is to be settled now, while all its blocks are on the device."""

    settlement: Settlement
    block_ids: list[int]  # of the prompt, the last one perhaps partly filled
    num_tokens: int  # of the prompt
    history_lo: int  # blocks
    history_hi: int
    budget_blocks: int
    layer_blocks: tuple[int, ...] = ()  # as in `DecodeOptions`

    def budget(self, layer: int) -> int:
        """Blocks of a layer."""
        return self.layer_blocks[layer] if self.layer_blocks else self.budget_blocks


@dataclass(frozen=True)
class RequestUpdate:
    """New facts about one tracked request."""

    slot: int  # row of the worker's tables, the request's own while it is tracked
    options: DecodeOptions | None  # with the first update
    block_ids: list[int]  # blocks to copy out, continuing where the last update ended
    page_ids: list[int]  # their host pages
    row_pages: list[int]  # pages whose sentence rows the request may use from now on
    sentence_ends: Int32s  # ends of newly sealed sentences, exclusive
    private_blocks: list[int] | None  # the working set, when it has been drawn
    settled: SettledPrompt | None = None
    staging: list[int] | None = None  # private blocks that its history visits, once drawn
    last_query: int = -1  # with the working set: place of the prompt's last query, or -1: not kept


@dataclass(frozen=True)
class SparseRows:
    """The sparse decode rows of a step, column by column."""

    slots: Int32s  # [S]
    tail_blocks: Int32s  # [S] block that the row's token is written to: its only owner
    history_lo: Int32s  # [S]
    history_hi: Int32s  # [S]
    seq_lens: Int32s  # [S] tokens of the request, this step's included
    restarts: npt.NDArray[np.bool_]  # [S] ranks by its own query: what came before is forgotten
    request_ids: list[str] = field(default_factory=list)

    def take(self, order: npt.NDArray[np.int64]) -> SparseRows:
        """The rows in another order, [S] each at most once."""
        return SparseRows(
            self.slots[order],
            self.tail_blocks[order],
            self.history_lo[order],
            self.history_hi[order],
            self.seq_lens[order],
            self.restarts[order],
            [self.request_ids[i] for i in order] if self.request_ids else [],
        )


@dataclass(frozen=True)
class ObservedRows:
    """Prefill rows of a step that compute voting tokens, column by column."""

    slots: Int32s  # [n]
    tail_blocks: Int32s  # [n] block that the row's last token is written to
    offsets: Int32s  # [n] tokens from the first voting one to the row's last
    counts: Int32s  # [n] voting tokens in the row
    places: Int32s  # [n] place of the first one in the window
    request_ids: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class VisitRows:
    """Dense rows of a step whose history is on the host only, column by column."""

    slots: Int32s  # [n]
    tail_blocks: Int32s  # [n] block that the row's last token is written to
    lost_lo: Int32s  # [n] blocks [lost_lo, lost_hi) have a host page and no GPU block
    lost_hi: Int32s  # [n]
    request_ids: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class StepMessage:
    """Scheduler to worker."""

    step: int
    dropped: list[int] = field(default_factory=list)  # slots
    updates: list[RequestUpdate] = field(default_factory=list)
    sparse: SparseRows | None = None
    frees: bool = False  # blocks that were copied out now or earlier may be written from now on
    observed: ObservedRows | None = None
    visits: VisitRows | None = None


@dataclass(frozen=True)
class StepReport:
    """Worker to scheduler: head-blocks selected in a step, by slot."""

    slots: Int32s  # [S]
    hits: npt.NDArray[np.int64]  # [S] found resident, over layers and KV heads
    misses: npt.NDArray[np.int64]  # [S] swapped in
    coverage: npt.NDArray[np.float32]  # [S] mean estimated attention mass selected, or NaN
    step: int  # of the message that it answers; the slots were those of its requests
    ranks: int = 1  # workers that the numbers were added up over; `coverage` is their sum
