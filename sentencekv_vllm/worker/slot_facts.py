# SPDX-License-Identifier: Apache-2.0
"""What the rows of a step have in the tables, looked up again only when the tables change."""

from __future__ import annotations

from dataclasses import dataclass

from ..messages import Int32s
from ..types import IndexKind, QueryKind
from .tables import Tables
from .transfer import Array


@dataclass(frozen=True)
class SlotFacts:
    """Columns [S] of a step's rows that the step itself does not change.

    Attributes:
        columns: those that the device is told, by name.
        unranked: rows that choose nothing.
        token_codes_only: all rows rank by token codes.
    """

    columns: dict[str, Array]
    unranked: Array
    max_pages: int
    max_sentences: int
    token_codes_only: bool
    any_running: bool
    any_previous: bool
    any_estimates: bool

    @classmethod
    def of(cls, tables: Tables, slots: Int32s) -> SlotFacts:
        options = {name: column[slots] for name, column in tables.options.items()}
        columns = {
            "slots": slots.copy(),
            "num_pages": tables.pages.counts[slots],
            "num_sentences": tables.num_indexed[slots],
            "index_kind": options["index_kind"],
            "reduce": options["reduce"],
            "seed": options["seed"],
            "retention": tables.retention[slots],
            "running": options["query_kind"] == QueryKind.RUNNING_MEAN,
            "previous": options["query_kind"] == QueryKind.PREVIOUS,
            "estimates": options["estimates"],
        }
        return cls(
            columns=columns,
            unranked=options["unranked"].astype(bool),
            max_pages=int(columns["num_pages"].max()),
            max_sentences=int(columns["num_sentences"].max()),
            token_codes_only=bool((options["index_kind"] == IndexKind.TOKEN_CODES).all()),
            any_running=bool(columns["running"].any()),
            any_previous=bool(columns["previous"].any()),
            any_estimates=bool(columns["estimates"].any()),
        )


class LatestSlotFacts:
    """The facts of the last step, which are those of the next one in most steps."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._key: tuple[bytes, bytes] | None = None
        self._facts: SlotFacts | None = None

    def __call__(self, slots: Int32s) -> SlotFacts:
        key = (slots.tobytes(), self._tables.changes[slots].tobytes())
        if self._facts is None or key != self._key:
            self._key, self._facts = key, SlotFacts.of(self._tables, slots)
        return self._facts
