# SPDX-License-Identifier: Apache-2.0
"""Every query of the dashboard and of the rules, and the series that it asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "sentencekv.json"
RULES = DEPLOY / "prometheus" / "rules.yml"
VARIABLES = {"$__rate_interval": "5m", "$model": ".*"}


@dataclass(frozen=True)
class Series:
    """A selector: the name of a metric, and what its labels must be."""

    name: str
    labels: tuple[tuple[str, str, str], ...]  # label, operator, value

    def takes(self, name: str, labels: dict[str, str]) -> bool:
        fits = {"Equal": lambda a, b: a == b, "Re": lambda a, b: re.fullmatch(b, a) is not None}
        return name == self.name and all(
            fits[operator](labels.get(label, ""), value) for label, operator, value in self.labels
        )


def panels() -> list[dict[str, Any]]:
    found = json.loads(DASHBOARD.read_text())["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> dict[str, str]:
    """By where they stand; Grafana's variables are filled in."""
    found = {
        f"panel {panel['title']}, {target['refId']}": target["expr"]
        for panel in panels()
        for target in panel["targets"]
    }
    found |= {f"rule {rule.get('alert') or rule['record']}": rule["expr"] for rule in rules()}
    for variable, value in VARIABLES.items():
        found = {where: query.replace(variable, value) for where, query in found.items()}
    return found


def series(query: str) -> list[Series]:
    """What a query reads. Raises ValueError where it is no PromQL."""
    return [
        Series(
            node.name,
            tuple((m.name, str(m.op).split(".")[-1], m.value) for m in node.matchers.matchers),
        )
        for node in _selectors(promql_parser.parse(query))
    ]


def _selectors(node: Any) -> Iterator[Any]:
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("lhs", "rhs", "expr", "vector_selector"):
        if hasattr(node, name):
            yield from _selectors(getattr(node, name))
    for argument in getattr(node, "args", ()):
        yield from _selectors(argument)
