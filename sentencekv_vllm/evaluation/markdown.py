# SPDX-License-Identifier: Apache-2.0
"""The summary as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .divergence import BUCKET
from .items import ANY
from .share import NO_NUMBERS
from .table import Row
from .variant import DENSE, Variant

MANY_CELLS = 8  # columns of a table


def markdown(
    rows: Sequence[Row],
    variants: Sequence[Variant],
    history_tokens: Callable[[int], int] | None = None,
) -> str:
    """All questions together, then cells against variants: accuracy, kept, traffic; long texts.

    Args:
        rows: of `table.summarise`.
        variants: in the order to show them.
        history_tokens: tokens of the history that a budget selects.
    """
    sparse = [v for v in variants if v.name != DENSE]
    answered = concise([row for row in rows if row.cell is None or not row.cell.is_text])
    tables = []
    if any(row.cell for row in answered):
        tables += [
            _pooled([row for row in rows if row.cell is None], history_tokens),
            _pivot(answered, "Score (95 % interval)", variants, _exact),
            _pivot(answered, "Score on the questions that dense attention solves", sparse, _kept),
            _pivot(
                answered,
                "Hit rate, KiB swapped in per step, share of attention selected",
                sparse,
                _traffic,
            ),
        ]
    texts = [row for row in rows if row.cell and row.cell.is_text]
    for cell in dict.fromkeys(row.cell for row in texts):
        tables.append(_text([row for row in texts if row.cell == cell]))
    return "\n\n".join([*tables, *_dense_steps(rows, sparse)])


def concise(rows: Sequence[Row]) -> Sequence[Row]:
    """Without the cells where they are many and pools stand for them; the CSV has them."""
    cells = {row.cell for row in rows if row.cell}
    pooled = {cell for cell in cells if ANY in (cell.task, cell.style)}
    hidden = cells - pooled if pooled and len(cells - pooled) > MANY_CELLS else pooled
    return [row for row in rows if row.cell not in hidden]


def _dense_steps(rows: Sequence[Row], sparse: Sequence[Variant]) -> list[str]:
    found = [row for row in rows if row.variant in sparse and row.sparse.value < 1]
    if not found:
        return []
    head = "Decode steps that were run densely, so that these rows flatter the policy:\n\n"
    return [
        head
        + "\n".join(
            f"- {row.cell or 'all'}, {row.variant}: sparse in {row.sparse.value:.1%}"
            for row in found
        )
    ]


def _pooled(rows: Sequence[Row], history_tokens: Callable[[int], int] | None) -> str:
    head = [
        *("policy @ budget", "history", "questions", "score (95 % interval)", "kept of dense"),
        *("KL to dense", "hit rate", "KiB a step", "attention selected", "index B a token"),
    ]
    body = [
        [
            str(row.variant),
            _history(row.variant, history_tokens),
            str(row.exact.whole),
            str(row.exact),
            str(row.kept),
            row.kl.show(".4f"),
            _show(row.hits.value, ".2f"),
            _show(row.swapped_bytes_per_step / 1024, ".0f"),
            _show(row.coverage, ".2f"),
            _show(row.index_bytes, ".1f"),
        ]
        for row in rows
    ]
    return (
        "All questions together; a budget counts sinks and recent window, `history` is the rest of "
        f"it, tokens per KV head in whole blocks:\n\n{_table(head, body)}"
    )


def _history(variant: Variant, history_tokens: Callable[[int], int] | None) -> str:
    if variant.budget is None or history_tokens is None:
        return NO_NUMBERS
    return str(history_tokens(variant.budget))


def _text(rows: Sequence[Row]) -> str:
    """One long text: perplexity, next token, KL by the length of what has been decoded."""
    buckets = max(len(row.kl_by_length) for row in rows)
    steps = [f"KL, steps {BUCKET * i + 1}-{BUCKET * (i + 1)}" for i in range(buckets)]
    head = ["policy @ budget", "texts", "perplexity", "next token right", "KL to dense", *steps]
    body = [
        [
            str(row.variant),
            str(row.exact.whole),
            _perplexity(row),
            str(row.exact),
            row.kl.show(".4f"),
            *(mean.show(".4f") for mean in row.kl_by_length),
            *[NO_NUMBERS] * (buckets - len(row.kl_by_length)),
        ]
        for row in rows
    ]
    return f"{rows[0].cell}, decoded by force; intervals over texts:\n\n{_table(head, body)}"


def _perplexity(row: Row) -> str:
    if not row.nll.count:
        return NO_NUMBERS
    middle = math.exp(row.nll.value)
    if math.isnan(row.nll.half):
        return f"{middle:.3f}"
    low, high = (math.exp(row.nll.value + sign * row.nll.half) for sign in (-1, 1))
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def _show(value: float, form: str) -> str:
    return NO_NUMBERS if math.isnan(value) else format(value, form)


def _exact(row: Row) -> tuple[int, str]:
    return row.exact.whole, str(row.exact)


def _kept(row: Row) -> tuple[int, str]:
    return row.kept.whole, str(row.kept)


def _traffic(row: Row) -> tuple[int, str]:
    if not row.hits.whole:
        return row.exact.whole, NO_NUMBERS
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
