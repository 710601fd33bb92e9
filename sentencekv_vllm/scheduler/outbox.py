# SPDX-License-Identifier: Apache-2.0
"""What a step's message says: news of the tracked requests, and the rows that decode sparsely."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ..messages import Int32s, ObservedRows, RequestUpdate, SparseRows, VisitRows
from .request_state import RequestState, Unsent


def has_news(state: RequestState) -> bool:
    """The workers have to be told something about the request."""
    unsent = state.unsent
    return bool(unsent.block_ids) or unsent.private or unsent.staging or unsent.settled is not None


def take_update(state: RequestState) -> RequestUpdate:
    """Everything that is new about a request since the last call."""
    memory, unsent = state.memory, state.unsent
    update = RequestUpdate(
        slot=memory.slot,
        options=state.options if unsent.options else None,
        block_ids=unsent.block_ids,
        page_ids=memory.pages[unsent.pages :],
        row_pages=memory.row_pages[unsent.row_pages :],
        sentence_ends=state.ends[unsent.sentences :],
        private_blocks=memory.private if unsent.private else None,
        settled=unsent.settled,
        staging=memory.staging if unsent.staging else None,
        last_query=memory.last_query if unsent.private else -1,
    )
    state.unsent = Unsent(
        options=False,
        pages=len(memory.pages),
        row_pages=len(memory.row_pages),
        sentences=len(state.ends),
    )
    return update


def sparse_rows(
    rows: Sequence[tuple[RequestState, int]],
    restarts: Sequence[bool],
    block_id: Callable[[str, int], int],
    block_size: int,
) -> SparseRows:
    """Columns of the sparse rows of a step.

    Args:
        rows: requests with their computed tokens before the step.
        restarts: for each, see `SparseRows`.
        block_id: id of a request's j-th block.
        block_size: tokens.
    """

    def column(values: Iterable[int]) -> Int32s:
        return np.fromiter(values, np.int32, len(rows))

    return SparseRows(
        slots=column(s.memory.slot for s, _ in rows),
        tail_blocks=column(block_id(s.request_id, c // block_size) for s, c in rows),
        history_lo=column(s.memory.history_lo for s, _ in rows),
        history_hi=column(s.memory.history_hi for s, _ in rows),
        seq_lens=column(c + 1 for _, c in rows),
        restarts=np.asarray(restarts, np.bool_),
        request_ids=[s.request_id for s, _ in rows],
    )


def observed_rows(
    rows: Sequence[tuple[RequestState, int, int]],
    block_id: Callable[[str, int], int],
    block_size: int,
) -> ObservedRows:
    """Columns of the rows whose queries are kept in a step.

    Args:
        rows: requests with the range of tokens that the step computes, past the first that is kept.
        block_id, block_size: as in `sparse_rows`.
    """

    def column(values: Iterable[int]) -> Int32s:
        return np.fromiter(values, np.int32, len(rows))

    spans = [
        (max(start, s.watched_from), min(end, s.request.num_prompt_tokens))
        for s, start, end in rows
    ]
    return ObservedRows(
        slots=column(s.memory.slot for s, _, _ in rows),
        tail_blocks=column(block_id(s.request_id, (e - 1) // block_size) for s, _, e in rows),
        offsets=column(e - 1 - first for (first, _), (_, _, e) in zip(spans, rows, strict=True)),
        counts=column(last - first for first, last in spans),
        places=column(
            first - s.watched_from for (first, _), (s, _, _) in zip(spans, rows, strict=True)
        ),
        request_ids=[s.request_id for s, _, _ in rows],
    )


def visit_rows(
    rows: Sequence[tuple[RequestState, int]],
    block_id: Callable[[str, int], int],
    block_size: int,
    sink_blocks: int,
) -> VisitRows:
    """Columns of the rows of a step whose history is on the host.

    Args:
        rows: visitors with the end of the tokens that the step computes.
        block_id, block_size: as in `sparse_rows`.
        sink_blocks: what lies before the history.
    """

    def column(values: Iterable[int]) -> Int32s:
        return np.fromiter(values, np.int32, len(rows))

    return VisitRows(
        slots=column(s.memory.slot for s, _ in rows),
        tail_blocks=column(block_id(s.request_id, (e - 1) // block_size) for s, e in rows),
        lost_lo=column(sink_blocks for _ in rows),
        lost_hi=column(s.memory.lost for s, _ in rows),
        request_ids=[s.request_id for s, _ in rows],
    )
