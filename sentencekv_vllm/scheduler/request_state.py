# SPDX-License-Identifier: Apache-2.0
"""What the scheduler side knows of one request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ..messages import DecodeOptions, Int32s, SettledPrompt
from ..types import Settlement
from .reasons import Reason


class TokenSource(Protocol):
    """The parts of a vLLM request that are read here."""

    @property
    def num_tokens(self) -> int: ...

    num_prompt_tokens: int

    def is_finished(self) -> bool: ...


def no_ends() -> Int32s:
    return np.empty(0, np.int32)


@dataclass
class Memory:
    """What a request holds outside its own blocks; gone at finish and preemption."""

    slot: int = -1  # row of the worker's tables, or -1: not tracked
    tracked_since: int = -1  # the last step before the slot was this request's
    pages: list[int] = field(default_factory=list)  # page of block j
    row_pages: list[int] = field(default_factory=list)  # `pages`, and some for their rows only
    reserved: list[int] = field(default_factory=list)  # taken at admission, not used yet
    private: list[int] = field(default_factory=list)  # the working set's blocks
    admitted: bool = False  # has its first blocks, and the pages that were reserved
    visits: bool = False  # the prompt's history leaves during the prefill and visits
    most_blocks: int = 0  # of the GPU, until the prefill has ended
    lost: int = 0  # a visitor's blocks from the sinks up to here are on the host only
    staging: list[int] = field(default_factory=list)  # of a visitor: private blocks
    sparse: bool = False
    history_lo: int = 0
    history_hi: int = 0
    exact_tokens: int | None = None  # tokens whose KV is exact, once some are not
    decoded_sparse: bool = False  # at least one step
    observed: int = 0  # prompt tokens whose queries the workers have
    last_query: int = -1  # place of the last of them in the window, once it is the prompt's last


@dataclass
class Unsent:
    """What the workers have not been told yet."""

    options: bool = True
    block_ids: list[int] = field(default_factory=list)
    pages: int = 0  # first page not sent
    row_pages: int = 0
    sentences: int = 0
    private: bool = False
    staging: bool = False
    settled: SettledPrompt | None = None


@dataclass
class RequestState:
    """One request, from arrival to finish."""

    request_id: str
    request: TokenSource
    tokens: Callable[[int, int], Int32s]  # token ids [start, end)
    options: DecodeOptions | None  # None: dense for good
    keeps_all: bool = False  # policy full: the history must fit into the working set
    reason: Reason = Reason.SHORT_CONTEXT
    ends: Int32s = field(default_factory=no_ends)  # sealed sentences, exclusive ends
    segmentation: str = "none"  # none | submitted | done
    memory: Memory = field(default_factory=Memory)
    unsent: Unsent = field(default_factory=Unsent)
    short_answer: bool = False  # no step follows the prefill
    warm_start: bool = False  # the workers keep the query of the prompt's last token
    sparse_steps: int = 0
    blocks_released: int = 0
    hits: int = 0
    misses: int = 0
    coverage_sum: float = 0.0
    reports: int = 0  # steps whose coverage is known

    @property
    def block_groups(self) -> bool:
        return self.options is not None and self.options.block_groups

    @property
    def settlement(self) -> Settlement | None:
        return None if self.options is None else self.options.settlement

    @property
    def compacts(self) -> bool:
        return self.options is not None and self.options.compacts

    @property
    def voting_from(self) -> int:
        """First of the prompt's tokens whose queries vote; the end of the prompt if none do."""
        window = 0 if self.settlement is None else self.settlement.window
        return max(0, self.request.num_prompt_tokens - window)

    @property
    def watched_from(self) -> int:
        """First of the prompt's tokens whose queries the workers keep; its end: none."""
        return min(self.voting_from, self.request.num_prompt_tokens - int(self.warm_start))

    @property
    def sealed_tokens(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def sentences_within(self, tokens: int) -> int:
        """Sentences that end at or before token `tokens`."""
        return int(np.searchsorted(self.ends, tokens, side="right"))

    @property
    def mode(self) -> Reason:
        return Reason.SPARSE if self.sparse_steps else self.reason

    def summary(self) -> dict[str, int | float | str | None]:
        """What the response tells: `kv_transfer_params["sentencekv"]`."""
        looked_up = self.hits + self.misses
        return {
            "mode": str(self.mode),
            "sparse_steps": self.sparse_steps,
            "sentences": len(self.ends),
            "blocks_released": self.blocks_released,
            "hits": self.hits,
            "misses": self.misses,
            "hit_rate": round(self.hits / looked_up, 4) if looked_up else 0.0,
            "coverage": round(self.coverage_sum / self.reports, 4) if self.reports else None,
        }
