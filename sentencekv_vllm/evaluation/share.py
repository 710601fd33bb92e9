# SPDX-License-Identifier: Apache-2.0
"""Shares and means, with their uncertainty."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

NO_NUMBERS = "-"
Z95 = 1.959964  # two-sided 95 % of the normal distribution


@dataclass(frozen=True)
class Share:
    """Part of a whole, with its 95 % Wilson score interval (E. B. Wilson, JASA 1927).

    A part may be fractional: scores between 0 and 1 vary less than right or wrong with the same
    mean, so their interval is at most this wide.
    """

    part: float
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
            return NO_NUMBERS
        low, high = self.interval
        return f"{self.value:.2f} ({low:.2f}-{high:.2f})"


@dataclass(frozen=True)
class Mean:
    """Mean of a measured quantity, with its 95 % interval for large samples."""

    value: float  # NaN of nothing
    half: float  # half width; NaN of fewer than two
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        if not values:
            return cls(math.nan, math.nan, 0)
        half = math.nan
        if len(values) > 1:
            half = Z95 * statistics.stdev(values) / math.sqrt(len(values))
        return cls(statistics.fmean(values), half, len(values))

    def show(self, form: str) -> str:
        """With a format of both numbers."""
        if not self.count:
            return NO_NUMBERS
        value = format(self.value, form)
        return value if math.isnan(self.half) else f"{value} ± {format(self.half, form)}"
