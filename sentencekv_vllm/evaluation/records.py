# SPDX-License-Identifier: Apache-2.0
"""Results on disk: one JSON object a line, so that an interrupted run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .items import Cell
from .variant import Variant

Key = tuple[Cell, int, Variant]


class ResultsError(ValueError):
    """A results file belongs to other settings; the message says which."""


@dataclass(frozen=True)
class Record:
    """One question decoded in one way."""

    task: str
    style: str
    tokens: int
    seed: int
    variant: str  # `Variant.name`
    budget: int | None
    score: float  # 0 to 1, of the last turn
    text: str  # first line of the answer
    target: str  # what it should be, or one such text
    depth: float | None  # `Item.depth`
    kl: float | None  # nats per decode step from dense attention, `divergence`
    # The rest belongs to the last turn.
    output_tokens: int
    cached_tokens: int  # of the prompt, from the prefix cache
    mode: str  # `scheduler.reasons.Reason`
    sparse_steps: int  # of output_tokens - 1: the prefill gives the first token
    sentences: int
    prompt_tokens: int
    hits: int  # head-blocks
    misses: int
    coverage: float | None  # share of attention selected, mean over steps; None: not estimated
    server: str = ""  # `Variant.server`
    kl_by_length: list[float] | None = None  # `Measured`, of long texts only
    nll: float | None = None  # `Measured`

    @property
    def cell(self) -> Cell:
        return Cell(self.task, self.style, self.tokens)

    @property
    def key(self) -> Key:
        return self.cell, self.seed, Variant(self.variant, self.budget, self.server)


class Results:
    """An append-only file: a line of settings, then a line per record."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Open or create the file and read what it has.

        A last line without its end was being written when a run was killed: it is removed.

        Raises:
            ResultsError: the file was made with other settings.
        """
        self.path = path
        self.settings = dict(settings)
        self.records: dict[Key, Record] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if len(whole) < len(text):
            path.write_text(whole)
        lines = whole.splitlines()
        if not lines:
            self._append(dict(settings))
        else:
            self._check(json.loads(lines[0]), dict(settings))
        for line in lines[1:]:
            record = Record(**json.loads(line))
            self.records[record.key] = record

    def add(self, record: Record) -> None:
        """Write a record; it is on disk when this returns."""
        self._append(asdict(record))
        self.records[record.key] = record

    def _append(self, values: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def _check(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise ResultsError(
                    f"{self.path} was made with {name} {found.get(name)!r}, this run has "
                    f"{wanted.get(name)!r}: name another folder with --out, or delete this file"
                )
