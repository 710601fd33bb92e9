# SPDX-License-Identifier: Apache-2.0
"""Records to numbers with intervals, a row per cell and variant."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from .items import ANY_LENGTH, Cell, pools
from .kv_shape import KVShape
from .records import Record
from .share import Mean, Share
from .variant import DENSE, Variant


@dataclass(frozen=True)
class Row:
    """One variant on the questions of one cell; NaN where nothing was measured."""

    cell: Cell | None  # None: all cells with answers, not those with long texts
    variant: Variant
    exact: Share  # score of all questions
    kept: Share  # of the questions that dense attention solves
    sparse: Share  # of the decode steps: those that were run sparsely
    hits: Share  # of the selected head-blocks
    cached: Share  # of the prompt tokens: those found in the prefix cache
    coverage: float  # share of attention selected, mean over questions; NaN: not estimated
    kl: Mean  # nats per decode step from dense attention, over questions
    kl_by_length: tuple[Mean, ...]  # of each `divergence.BUCKET` steps
    nll: Mean  # nats per forced token
    swapped_bytes_per_step: float
    index_bytes: float  # per token of a KV head, of what the ranking reads

    def as_dict(self) -> dict[str, Any]:
        """Flat, for JSON and CSV."""
        cell = self.cell
        row: dict[str, Any] = {
            "task": cell.task if cell else "all",
            "style": cell.style if cell else "all",
            "tokens": cell.tokens if cell and cell.tokens != ANY_LENGTH else "all",
            "variant": self.variant.label,
            "budget": self.variant.budget,
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
            "kl": _number(self.kl.value, 6),
            "kl_half_interval": _number(self.kl.half, 6),
            "nll": _number(self.nll.value, 6),
            "nll_half_interval": _number(self.nll.half, 6),
            "sparse_steps": _number(self.sparse.value),
            "hit_rate": _number(self.hits.value),
            "coverage": _number(self.coverage),
            "swapped_kib_per_step": _number(self.swapped_bytes_per_step / 1024),
            "index_bytes_per_token": _number(self.index_bytes),
            "cached_prompt": _number(self.cached.value),
        }


def _number(value: float, digits: int = 4) -> float | None:
    """For files: JSON has no NaN."""
    return None if math.isnan(value) else round(value, digits)


def summarise(
    records: Iterable[Record],
    cells: Sequence[Cell],
    variants: Sequence[Variant],
    kv_shape: KVShape | None = None,
) -> list[Row]:
    """A row per cell and variant, then per pool of cells, then one per variant over all cells.

    Only questions that every variant has answered count, so that rows are comparable. Bytes
    are unknown without `kv_shape`.
    """
    by_key = {record.key: record for record in records}
    asked = dict.fromkeys((cell, seed) for cell, seed, _ in by_key if cell in cells)
    shared = [(c, s) for c, s in asked if all((c, s, v) in by_key for v in variants)]
    dense = Variant(DENSE)
    solved = {
        (c, s)
        for c, s in shared
        if dense in variants and by_key[c, s, dense].score == 1 and not c.is_text
    }
    return [
        _row(
            cell,
            variant,
            [by_key[c, s, variant] for c, s in shared if _counts(cell, c)],
            solved,
            kv_shape,
        )
        for cell in (*cells, *pools(cells), None)
        for variant in variants
    ]


def _counts(cell: Cell | None, asked: Cell) -> bool:
    """Long texts have no answers: they are not pooled."""
    if asked.is_text:
        return cell == asked
    return cell is None or cell.covers(asked)


def _row(
    cell: Cell | None,
    variant: Variant,
    records: Sequence[Record],
    solved: set[tuple[Cell, int]],
    kv_shape: KVShape | None,
) -> Row:
    kept = [r.score for r in records if (r.cell, r.seed) in solved]
    sparse = [r for r in records if r.sparse_steps]
    hits, misses = sum(r.hits for r in sparse), sum(r.misses for r in sparse)
    steps = sum(r.sparse_steps for r in sparse)
    prompt_tokens = sum(r.prompt_tokens for r in records)
    swapped = index_bytes = math.nan
    if kv_shape and steps:
        swapped = misses * kv_shape.swapped_bytes(variant.host_kv_dtype) / steps
    if kv_shape and records:
        length = prompt_tokens / max(1, sum(r.sentences for r in records))
        index_bytes = kv_shape.index_bytes(
            variant.index, length, variant.code_share, variant.code_bits
        )
    return Row(
        cell=cell,
        variant=variant,
        exact=Share(sum(r.score for r in records), len(records)),
        kept=Share(sum(kept), len(kept)),
        sparse=Share(steps, sum(r.output_tokens - 1 for r in records)),
        hits=Share(hits, hits + misses),
        cached=Share(sum(r.cached_tokens for r in records), prompt_tokens),
        coverage=_mean([r.coverage for r in sparse if r.coverage]),
        kl=Mean.of([r.kl for r in records if r.kl is not None]),
        kl_by_length=_curve([r.kl_by_length for r in records if r.kl_by_length]),
        nll=Mean.of([r.nll for r in records if r.nll is not None]),
        swapped_bytes_per_step=swapped,
        index_bytes=index_bytes,
    )


def _curve(curves: Sequence[Sequence[float]]) -> tuple[Mean, ...]:
    """Over questions, which may be of unequal length."""
    return tuple(
        Mean.of([kl for kl in bucket if kl is not None]) for bucket in zip_longest(*curves)
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
