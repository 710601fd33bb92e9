# SPDX-License-Identifier: Apache-2.0
"""The summary as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .table import Row
from .variant import DENSE, Variant


def markdown(rows: Sequence[Row], variants: Sequence[Variant]) -> str:
    """All questions together, then cells against variants: accuracy, kept, traffic."""
    sparse = [v for v in variants if v.name != DENSE]
    tables = [
        _pooled([row for row in rows if row.cell is None]),
        _pivot(rows, "Score (95 % interval)", variants, _exact),
        _pivot(rows, "Score on the questions that dense attention solves", sparse, _kept),
        _pivot(
            rows,
            "Hit rate, KiB swapped in per step, share of attention selected",
            sparse,
            _traffic,
        ),
    ]
    text = "\n\n".join(tables)
    dense_steps = [row for row in rows if row.variant in sparse and row.sparse.value < 1]
    if dense_steps:
        text += "\n\nDecode steps that were run densely, so that these rows flatter the policy:\n"
        text += "".join(f"\n- {row.cell or 'all'}, {row.variant}: sparse in {row.sparse.value:.1%}"
                        for row in dense_steps)  # fmt: skip
    return text


def _pooled(rows: Sequence[Row]) -> str:
    head = [
        *("policy @ budget", "questions", "score (95 % interval)", "kept of dense"),
        *("KL to dense", "hit rate", "KiB a step", "attention selected", "index B a token"),
    ]
    body = [
        [
            str(row.variant),
            str(row.exact.whole),
            str(row.exact),
            str(row.kept),
            _show(row.kl, ".4f"),
            _show(row.hits.value, ".2f"),
            _show(row.swapped_bytes_per_step / 1024, ".0f"),
            _show(row.coverage, ".2f"),
            _show(row.index_bytes, ".1f"),
        ]
        for row in rows
    ]
    return f"All questions together:\n\n{_table(head, body)}"


def _show(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _exact(row: Row) -> tuple[int, str]:
    return row.exact.whole, str(row.exact)


def _kept(row: Row) -> tuple[int, str]:
    return row.kept.whole, str(row.kept)


def _traffic(row: Row) -> tuple[int, str]:
    if not row.hits.whole:
        return row.exact.whole, "-"
    kib = _show(row.swapped_bytes_per_step / 1024, ".0f")
    return row.exact.whole, f"{row.hits.value:.2f}, {kib}, {_show(row.coverage, '.2f')}"


def _pivot(
    rows: Sequence[Row],
    title: str,
    variants: Sequence[Variant],
    show: Callable[[Row], tuple[int, str]],
) -> str:
    """Cells against variants; `show` gives the number of questions and an entry."""
    shown = {(row.cell, row.variant): show(row) for row in rows}
    cells = list(dict.fromkeys(row.cell for row in rows))
    counts = {cell: next((shown[cell, v][0] for v in variants), 0) for cell in cells}
    if len(variants) > len(cells):  # the longer list goes down
        head = ["policy @ budget", *(f"{cell or 'all'} ({counts[cell]})" for cell in cells)]
        body = [[str(v), *(shown[cell, v][1] for cell in cells)] for v in variants]
    else:
        head = ["task / style / tokens", "questions", *map(str, variants)]
        body = [
            [str(cell or "all"), str(counts[cell]), *(shown[cell, v][1] for v in variants)]
            for cell in cells
        ]
    return f"{title}:\n\n{_table(head, body)}"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(entries)} |" for entries in (head, *body)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])
