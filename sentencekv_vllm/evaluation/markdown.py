# SPDX-License-Identifier: Apache-2.0
"""The summary as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .table import Row
from .variant import DENSE, Variant


def markdown(rows: Sequence[Row], variants: Sequence[Variant]) -> str:
    """All questions together, then cells down and variants across: accuracy, kept, traffic."""
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
    lines = [
        "All questions together:",
        "",
        "| policy @ budget | questions | score (95 % interval) | kept of dense | KL to dense "
        "| hit rate | KiB a step | attention selected | index B a token |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        entries = [
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
        lines.append(f"| {' | '.join(entries)} |")
    return "\n".join(lines)


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
    """Cells down, variants across; `show` gives the number of questions and an entry."""
    found = {(row.cell, row.variant): row for row in rows}
    lines = [
        f"{title}:",
        "",
        f"| task / style / tokens | questions | {' | '.join(map(str, variants))} |",
        "|---" * (2 + len(variants)) + "|",
    ]
    for cell in dict.fromkeys(row.cell for row in rows):
        shown = [show(found[cell, variant]) for variant in variants]
        entries = " | ".join(entry for _, entry in shown)
        lines.append(f"| {cell or 'all'} | {shown[0][0] if shown else 0} | {entries} |")
    return "\n".join(lines)
