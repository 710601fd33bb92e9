# SPDX-License-Identifier: Apache-2.0
"""What a run measured, as figures; needs matplotlib."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from .divergence import BUCKET
from .markdown import concise
from .records import Record
from .share import Share
from .table import Row
from .variant import Variant

DEPTH_BINS = 5
MARKERS = "osv^D"
COLOURS = colormaps["tab20"]([*range(0, 20, 2), *range(1, 20, 2)])  # strong ones first


def figures(rows: Sequence[Row], records: Sequence[Record]) -> Iterator[tuple[str, Figure]]:
    """Name and figure of each plot that the run has data for."""
    answered = concise([row for row in rows if row.cell is None or not row.cell.is_text])
    if any(row.exact.whole for row in answered):
        yield "accuracy", accuracy(answered)
    if any(record.depth is not None for record in records):
        yield "depth", depth(records)
    if any(row.hits.whole for row in rows):
        yield "traffic", traffic(rows)
    if any(row.kl.count for row in rows if row.cell is None):
        yield "divergence", divergence(rows)
    if any(row.kl_by_length for row in rows):
        yield "divergence_by_length", divergence_by_length(rows)


def accuracy(rows: Sequence[Row]) -> Figure:
    """Score against budget, a panel per cell; a dashed line where no budget applies."""
    if len({row.variant.budget for row in rows if row.variant.budget}) < 2:
        return _accuracy_bars(rows)
    cells = list(dict.fromkeys(row.cell for row in rows))
    figure, panels = _panels(len(cells), 4.2, 3.2)
    for panel, cell in zip(panels, cells, strict=True):
        own = [row for row in rows if row.cell == cell]
        by_name = _by_name(own)
        for number, (name, series) in enumerate(by_name.items()):
            style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "label": name}
            marker = _line(number)["marker"]
            values = [row.exact.value for row in series]
            budgets = [row.variant.budget for row in series]
            if budgets == [None]:
                panel.axhline(values[0], linestyle="--", **style)
                continue
            ends = [row.exact.interval for row in series]
            errors = [
                [max(0.0, v - low) for v, (low, _) in zip(values, ends, strict=True)],
                [max(0.0, high - v) for v, (_, high) in zip(values, ends, strict=True)],
            ]
            # A little apart, so that intervals do not hide each other.
            shift = 1.012 ** (number - len(by_name) / 2)
            places = [budget * shift for budget in budgets if budget]
            panel.errorbar(places, values, yerr=errors, marker=marker, ms=4, capsize=2, **style)
        _budget_axis(panel, own)
        panel.set(title=str(cell or "all questions"), ylim=(-0.03, 1.03), ylabel="score")
    _legend(figure, panels[-1])
    return figure


def _accuracy_bars(rows: Sequence[Row]) -> Figure:
    """Of one budget: a bar with its interval per variant, a panel per cell."""
    cells = list(dict.fromkeys(row.cell for row in rows))
    names = list(dict.fromkeys(str(row.variant) for row in rows))
    figure, panels = _panels(len(cells), 4.6, 0.8 + 0.2 * len(names))
    for panel, cell in zip(panels, cells, strict=True):
        own = [row for row in rows if row.cell == cell]
        values = [row.exact.value for row in own]
        ends = [row.exact.interval for row in own]
        errors = [
            [max(0.0, v - low) for v, (low, _) in zip(values, ends, strict=True)],
            [max(0.0, high - v) for v, (_, high) in zip(values, ends, strict=True)],
        ]
        panel.barh([str(row.variant) for row in own], values, xerr=errors, capsize=2)
        panel.set(title=str(cell or "all questions"), xlim=(0, 1.03), xlabel="score")
        panel.tick_params(labelsize=7)
        panel.invert_yaxis()
    return figure


def depth(records: Sequence[Record]) -> Figure:
    """Score by the depth of the evidence (down) and prompt length (across), per variant, at the
    smallest budget."""
    placed = [r for r in records if r.depth is not None and r.budget in (None, _smallest(records))]
    variants = list(dict.fromkeys(r.key[2] for r in placed))
    lengths = sorted({record.tokens for record in placed})
    figure, panels = _panels(len(variants), 1.4 + 0.7 * len(lengths), 2.8)
    for panel, variant in zip(panels, variants, strict=True):
        shares = _by_depth([r for r in placed if r.key[2] == variant])
        grid = [[shares[row, n].value for n in lengths] for row in range(DEPTH_BINS)]
        panel.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", alpha=0.7, aspect="auto")
        for row in range(DEPTH_BINS):
            for column, length in enumerate(lengths):
                share = shares[row, length]
                text = f"{share.value:.2f}\nof {share.whole}" if share.whole else "-"
                panel.text(column, row, text, ha="center", va="center", fontsize=6)
        panel.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        ends = [100 * row // DEPTH_BINS for row in range(DEPTH_BINS + 1)]
        labels = [f"{low}-{high}%" for low, high in pairwise(ends)]
        panel.set_yticks(range(DEPTH_BINS), labels)
        panel.set_title(_wrapped(variant), fontsize=8)
        panel.tick_params(labelsize=7)
    figure.supxlabel("prompt tokens")
    figure.supylabel("depth")
    return figure


def traffic(rows: Sequence[Row]) -> Figure:
    """Hit rate and KiB swapped in per step, over all questions."""
    pooled = [row for row in rows if row.cell is None and row.hits.whole]
    hits = [(row.variant, row.hits.value) for row in pooled]
    swapped = [(row.variant, row.swapped_bytes_per_step / 1024) for row in pooled]
    return _bars([("hit rate", hits), ("KiB swapped in per step", swapped)])


def divergence(rows: Sequence[Row]) -> Figure:
    """KL to dense attention, over all questions, on a logarithmic axis."""
    pooled = [row for row in rows if row.cell is None and row.kl.value > 0]
    figure = _bars(
        [("KL to dense, nats per step", [(row.variant, row.kl.value) for row in pooled])]
    )
    figure.axes[0].set_xscale("log")
    return figure


def divergence_by_length(rows: Sequence[Row]) -> Figure:
    """KL to dense attention along the forced text, a panel per text, on a logarithmic axis, at the
    smallest budget."""
    smallest = _smallest(row.variant for row in rows)
    long = [
        row
        for row in rows
        if row.kl_by_length and row.kl.value > 0 and row.variant.budget in (None, smallest)
    ]
    cells = list(dict.fromkeys(row.cell for row in long))
    figure, panels = _panels(len(cells), 5.0, 3.6)
    for panel, cell in zip(panels, cells, strict=True):
        for number, row in enumerate(row for row in long if row.cell == cell):
            steps = [BUCKET * (i + 0.5) for i in range(len(row.kl_by_length))]
            values = [mean.value for mean in row.kl_by_length]
            panel.plot(steps, values, label=str(row.variant), **_line(number))
        panel.set_yscale("log")
        panel.set(title=str(cell), xlabel="tokens decoded", ylabel="KL to dense, nats per step")
    _legend(figure, panels[-1])
    return figure


def _smallest(budgeted: Iterable[Record | Variant]) -> int | None:
    return min((found.budget for found in budgeted if found.budget), default=None)


def _line(number: int) -> dict[str, Any]:
    """Told apart by colour and marker."""
    marker = MARKERS[number // len(COLOURS) % len(MARKERS)] if number >= 10 else "o"
    return {"color": COLOURS[number % len(COLOURS)], "marker": marker, "markersize": 4}


def _bars(panels: Sequence[tuple[str, Sequence[tuple[Variant, float]]]]) -> Figure:
    bars = len(panels[0][1])
    figure = Figure(figsize=(4 + 3.2 * len(panels), 1.2 + 0.24 * bars), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (title, values) in zip(axes, panels, strict=True):
        panel.barh([str(variant) for variant, _ in values], [value for _, value in values])
        panel.set_xlabel(title)
        panel.tick_params(labelsize=8)
    axes[0].invert_yaxis()
    return figure


def _panels(count: int, width: float, height: float) -> tuple[Figure, Sequence[Any]]:
    columns = min(count, 4)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * lines + 0.4), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]


def _by_name(rows: Sequence[Row]) -> dict[str, list[Row]]:
    series: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        series[row.variant.label].append(row)
    return series


def _by_depth(records: Sequence[Record]) -> dict[tuple[int, int], Share]:
    """Score by depth bin and prompt length."""
    scores: dict[tuple[int, int], list[float]] = defaultdict(list)
    for record in records:
        assert record.depth is not None, "records without a depth were left out"
        row = min(int(record.depth * DEPTH_BINS), DEPTH_BINS - 1)
        scores[row, record.tokens].append(record.score)
    empty = Share(0, 0)
    return defaultdict(lambda: empty, {k: Share(sum(v), len(v)) for k, v in scores.items()})


def _budget_axis(panel: Any, rows: Sequence[Row]) -> None:
    budgets = sorted({row.variant.budget for row in rows if row.variant.budget})
    if budgets:
        panel.set_xscale("log", base=2)
        panel.set_xticks(budgets, [str(budget) for budget in budgets])
        panel.minorticks_off()
        panel.set_xlim(budgets[0] / 1.15, budgets[-1] * 1.15)
    panel.set_xlabel("token budget")


def _legend(figure: Figure, panel: Any) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)


def _wrapped(variant: Variant) -> str:
    return str(variant).replace(", ", ",\n").replace(" @", "\n@")
