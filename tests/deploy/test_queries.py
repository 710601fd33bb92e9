# SPDX-License-Identifier: Apache-2.0
"""Dashboard and rules: PromQL, complete, and about series that are exported or recorded."""

from __future__ import annotations

import pytest

pytest.importorskip("promql_parser", reason="promql-parser is not installed")

import queries  # noqa: E402

from sentencekv_vllm.metrics import COUNTERS, GAUGES  # noqa: E402

QUERIES = queries.queries()
READ = {name for query in QUERIES.values() for name in {s.name for s in queries.series(query)}}


def test_every_counter_and_gauge_of_ours_is_on_the_dashboard():
    shown = {
        s.name
        for where, query in QUERIES.items()
        if where.startswith("panel")
        for s in queries.series(query)
    }
    ours = {f"vllm:sentencekv_{name}_total" for name in COUNTERS}
    ours |= {f"vllm:sentencekv_{name}" for name in GAUGES}
    ours |= {"vllm:sentencekv_requests_total", "vllm:sentencekv_segmented_total"}
    assert ours <= shown, ours - shown
    assert {n for n in shown if "sentencekv_" in n} <= ours


def test_what_is_not_exported_is_recorded():
    recorded = {rule["record"] for rule in queries.rules() if "record" in rule}
    assert {name for name in READ if not name.startswith("vllm:")} <= recorded


def test_alerts_say_how_bad_it_is_and_what_to_do():
    alerts = [rule for rule in queries.rules() if "alert" in rule]
    assert len({rule["alert"] for rule in alerts}) == len(alerts) > 4
    for rule in alerts:
        assert rule["labels"]["severity"] in ("info", "warning")
        assert set(rule["annotations"]) == {"summary", "description"}, rule["alert"]


def test_panels_do_not_overlap_and_read_the_chosen_source():
    taken: set[tuple[int, int]] = set()
    for panel in queries.panels():
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"])
                 for y in range(at["y"], at["y"] + at["h"])}  # fmt: skip
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all("$model" in target["expr"] for target in panel["targets"]), panel["title"]


@pytest.mark.parametrize("query", ["rate(vllm:x[5m)", "sum by (a (b)"])
def test_a_query_that_is_no_promql_is_found(query):
    with pytest.raises(ValueError):
        queries.series(query)
