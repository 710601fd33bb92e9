# SPDX-License-Identifier: Apache-2.0
"""The text that a Prometheus endpoint returns, as numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator

_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Metrics:
    """One reading of an endpoint."""

    def __init__(self, text: str) -> None:
        self._text = text

    def value(self, name: str, **labels: str) -> float:
        """A metric, added up over its samples with these labels; 0 where there is none."""
        return sum(value for found, value in self._samples(name) if labels.items() <= found.items())

    def label(self, name: str, label: str) -> str:
        """A label of a metric's first sample.

        Raises:
            KeyError: no such metric, or no such label.
        """
        for labels, _ in self._samples(name):
            return labels[label]
        raise KeyError(f"there is no metric {name!r}")

    def _samples(self, name: str) -> Iterator[tuple[dict[str, str], float]]:
        for line in self._text.splitlines():
            sample = _SAMPLE.match(line)
            if sample and sample[1] == name:
                yield dict(_LABEL.findall(sample[2] or "")), float(sample[3])
