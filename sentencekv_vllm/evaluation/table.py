# SPDX-License-Identifier: Apache-2.0
"""Records to numbers with intervals, and numbers to text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .engine import DENSE
from .items import Cell
from .records import Record

Z95 = 1.959964  # two-sided 95 % of the normal distribution


@dataclass(frozen=True)
class Share:
    """Part of a whole, with its 95 % Wilson score interval (E. B. Wilson, JASA 1927)."""

    part: int
    whole: int

    @property
    def value(self) -> float:
        return self.part / self.whole if self.whole else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end; everything is possible where nothing was observed."""
        if not self.whole:
            return 0.0, 1.0
        n, p = self.whole, self.value
        centre = p + Z95**2 / (2 * n)
        half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
        scale = 1 + Z95**2 / n
        return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)

    def __str__(self) -> str:
        if not self.whole:
            return "-"
        low, high = self.interval
        return f"{self.value:.2f} ({low:.2f}-{high:.2f})"


@dataclass(frozen=True)
class Row:
    """One policy on the questions of one cell."""

    cell: Cell | None  # None: all cells
    policy: str
    exact: Share  # of all questions
    kept: Share  # of the questions that dense attention solves
    sparse: Share  # of the decode steps: those that were run sparsely
    hits: Share  # of the selected head-blocks
    coverage: float  # share of attention selected, mean over questions; NaN: not estimated
    swapped_bytes_per_step: float

    def as_dict(self) -> dict[str, Any]:
        """Flat, for JSON and CSV."""
        cell = self.cell
        row: dict[str, Any] = {
            "task": cell.task if cell else "all",
            "style": cell.style if cell else "all",
            "tokens": cell.tokens if cell else "all",
            "policy": self.policy,
        }
        for name in ("exact", "kept"):
            share: Share = getattr(self, name)
            low, high = share.interval
            row |= {
                f"{name}_questions": share.whole,
                name: _number(share.value),
                f"{name}_low": _number(low),
                f"{name}_high": _number(high),
            }
        return row | {
            "sparse_steps": _number(self.sparse.value),
            "hit_rate": _number(self.hits.value),
            "coverage": _number(self.coverage),
            "swapped_kib_per_step": _number(self.swapped_bytes_per_step / 1024),
        }


def _number(value: float) -> float | None:
    """For files: JSON has no NaN."""
    return None if math.isnan(value) else round(value, 4)


def summarise(
    records: Iterable[Record],
    cells: Sequence[Cell],
    policies: Sequence[str],
    head_block_bytes: int,
) -> list[Row]:
    """A row per cell and policy, then one per policy over all cells.

    Only questions that every policy has answered count, so that rows are comparable.
    """
    by_key = {record.key: record for record in records}
    asked = dict.fromkeys((cell, seed) for cell, seed, _ in by_key if cell in cells)
    shared = [(c, s) for c, s in asked if all((c, s, p) in by_key for p in policies)]
    solved = {(c, s) for c, s in shared if DENSE in policies and by_key[c, s, DENSE].correct}
    return [
        _row(
            cell,
            policy,
            [by_key[c, s, policy] for c, s in shared if cell in (None, c)],
            solved,
            head_block_bytes,
        )
        for cell in (*cells, None)
        for policy in policies
    ]


def _row(
    cell: Cell | None,
    policy: str,
    records: Sequence[Record],
    solved: set[tuple[Cell, int]],
    head_block_bytes: int,
) -> Row:
    kept = [r.correct for r in records if (r.cell, r.seed) in solved]
    sparse = [r for r in records if r.sparse_steps]
    hits, misses = sum(r.hits for r in sparse), sum(r.misses for r in sparse)
    steps = sum(r.sparse_steps for r in sparse)
    known = [r.coverage for r in sparse if r.coverage]
    return Row(
        cell=cell,
        policy=policy,
        exact=Share(sum(r.correct for r in records), len(records)),
        kept=Share(sum(kept), len(kept)),
        sparse=Share(steps, sum(r.output_tokens - 1 for r in records)),
        hits=Share(hits, hits + misses),
        coverage=sum(known) / len(known) if known else math.nan,
        swapped_bytes_per_step=misses * head_block_bytes / steps if steps else math.nan,
    )


def markdown(rows: Sequence[Row], policies: Sequence[str]) -> str:
    """Three tables, cells down and policies across: exact match, kept of dense, traffic."""
    sparse = [p for p in policies if p != DENSE]
    tables = [
        _pivot(rows, "Exact match (95 % interval)", policies, _exact),
        _pivot(rows, "Solved, of the questions that dense attention solves", sparse, _kept),
        _pivot(
            rows,
            "Hit rate, KiB swapped in per step, share of attention selected",
            sparse,
            _traffic,
        ),
    ]
    text = "\n\n".join(tables)
    dense_steps = [row for row in rows if row.policy in sparse and row.sparse.value < 1]
    if dense_steps:
        text += "\n\nDecode steps that were run densely, so that these rows flatter the policy:\n"
        text += "".join(f"\n- {row.cell or 'all'}, {row.policy}: sparse in {row.sparse.value:.1%}"
                        for row in dense_steps)  # fmt: skip
    return text


def _exact(row: Row) -> tuple[int, str]:
    return row.exact.whole, str(row.exact)


def _kept(row: Row) -> tuple[int, str]:
    return row.kept.whole, str(row.kept)


def _traffic(row: Row) -> tuple[int, str]:
    if not row.hits.whole:
        return row.exact.whole, "-"
    kib = row.swapped_bytes_per_step / 1024
    coverage = "-" if math.isnan(row.coverage) else f"{row.coverage:.2f}"
    return row.exact.whole, f"{row.hits.value:.2f}, {kib:.0f}, {coverage}"


def _pivot(
    rows: Sequence[Row],
    title: str,
    policies: Sequence[str],
    show: Callable[[Row], tuple[int, str]],
) -> str:
    """Cells down, policies across; `show` gives the number of questions and an entry."""
    found = {(row.cell, row.policy): row for row in rows}
    lines = [
        f"{title}:",
        "",
        f"| task / style / tokens | questions | {' | '.join(policies)} |",
        "|---" * (2 + len(policies)) + "|",
    ]
    for cell in dict.fromkeys(row.cell for row in rows):
        shown = [show(found[cell, policy]) for policy in policies]
        entries = " | ".join(entry for _, entry in shown)
        lines.append(f"| {cell or 'all'} | {shown[0][0] if shown else 0} | {entries} |")
    return "\n".join(lines)
