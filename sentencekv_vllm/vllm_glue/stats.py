# SPDX-License-Identifier: Apache-2.0
"""Our counters on vLLM's `/metrics` and in its periodic log line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from ..metrics import COUNTERS, GAUGES, REASON_PREFIX, SEGMENTER_PREFIX
from ..scheduler.reasons import Reason


@dataclass
class SentenceKVStats(KVConnectorStats):
    """`data` maps names of `metrics` to numbers: deltas for counters, levels for gauges."""

    def reset(self) -> None:
        self.data: dict[str, int] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, value in other.data.items():
            self.data[name] = value if name in GAUGES else self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """A short line for the log."""
        data = self.data
        looked_up = data.get("hits", 0) + data.get("misses", 0)
        line: dict[str, int | float] = {}
        if looked_up:
            line["SentenceKV hit rate"] = round(data.get("hits", 0) / looked_up, 3)
            line["swapped in MiB"] = round(data.get("swap_in_bytes", 0) / 2**20, 1)
        if data.get("coverage_rows"):
            share = data["coverage_millionths"] / data["coverage_rows"] / 1e6
            line["attention share selected"] = round(share, 3)
        if data.get("swap_out_bytes"):
            line["swapped out MiB"] = round(data["swap_out_bytes"] / 2**20, 1)
        line["host pages used"] = data.get("host_pages_used", 0)
        line["sparse requests"] = data.get("sparse_requests", 0)
        return line

    def is_empty(self) -> bool:
        return not self.data


class SentenceKVPromMetrics(KVConnectorPromMetrics):
    """Prometheus collectors in the API process."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(f"vllm:sentencekv_{name}", text, labelnames=labelnames)
            for name, text in COUNTERS.items()
        }
        self._gauges = {
            name: self._gauge_cls(
                f"vllm:sentencekv_{name}",
                text,
                labelnames=labelnames,
                multiprocess_mode="mostrecent",
            )
            for name, text in GAUGES.items()
        }
        self._requests = self._counter_cls(
            "vllm:sentencekv_requests",
            "Finished requests by how they decoded, with the reason where they stayed dense.",
            labelnames=[*labelnames, "reason"],
        )
        self._segmented = self._counter_cls(
            "vllm:sentencekv_segmented",
            "Prompts by the segmenter that answered, or why the table stood in for spaCy.",
            labelnames=[*labelnames, "segmenter"],
        )
        for labels in per_engine_labelvalues.values():
            for collector in (*self._counters.values(), *self._gauges.values()):
                collector.labels(*labels)
            for reason in Reason:
                self._requests.labels(*labels, str(reason))

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for name, value in transfer_stats_data.items():
            if name in self._counters:
                self._counters[name].labels(*labels).inc(value)
            elif name in self._gauges:
                self._gauges[name].labels(*labels).set(value)
            elif name.startswith(REASON_PREFIX):
                self._requests.labels(*labels, name.removeprefix(REASON_PREFIX)).inc(value)
            elif name.startswith(SEGMENTER_PREFIX):
                self._segmented.labels(*labels, name.removeprefix(SEGMENTER_PREFIX)).inc(value)
