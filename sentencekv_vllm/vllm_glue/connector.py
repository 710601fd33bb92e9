# SPDX-License-Identifier: Apache-2.0
"""KV connector: the channel between ledger and runtime, and the requests' lifecycle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

from ..messages import StepMessage, StepReport
from ..worker.runtime import Runtime
from .scheduler_side import SchedulerSide
from .stats import SentenceKVPromMetrics, SentenceKVStats
from .worker_side import build_runtime


@dataclass
class SentenceKVConnectorMetadata(KVConnectorMetadata):
    """One step's message."""

    message: StepMessage


@dataclass
class SentenceKVWorkerMetadata(KVConnectorWorkerMetadata):
    """One step's report; tensor-parallel ranks add up."""

    report: StepReport

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, SentenceKVWorkerMetadata)
        mine, theirs = self.report, other.report
        return SentenceKVWorkerMetadata(
            StepReport(
                slots=mine.slots,
                hits=mine.hits + theirs.hits,
                misses=mine.misses + theirs.misses,
                coverage=mine.coverage + theirs.coverage,
                step=mine.step,
                ranks=mine.ranks + theirs.ranks,
            )
        )


class SentenceKVConnector(KVConnectorBase_V1, SupportsHMA):
    """Injected by the plugin; the user never names it."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.runtime: Runtime | None = None
        self.attn_metadata: dict[str, Any] | None = None  # of the step, by layer
        self._scheduler: SchedulerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(vllm_config, kv_cache_config)

    @property
    def scheduler(self) -> SchedulerSide:
        assert self._scheduler is not None, "only in the scheduler's process"
        return self._scheduler

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # nothing is handed to another engine

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        return False  # sleeping discards the KV cache under the swap pool; vLLM 0.33 asks

    # Scheduler side ---------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self.scheduler.bind(kv_cache_manager)

    def on_new_request(self, request: Any) -> None:
        self.scheduler.add(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if self.scheduler.steps_aside(request.request_id):
            return None, False  # vLLM asks again, and looks at the requests behind it
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        return None

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        message = self.scheduler.message(scheduler_output)
        parts = (message.sparse, message.observed, message.visits)
        if any(part is not None for part in parts):
            # The V2 runner then calls `start_load_kv` before the forward and names the rows.
            scheduler_output.has_sync_kv_loads = True
        return SentenceKVConnectorMetadata(message)

    def update_connector_output(self, connector_output: Any) -> None:
        metadata = connector_output.kv_connector_worker_meta
        if metadata is not None:
            assert isinstance(metadata, SentenceKVWorkerMetadata)
            self.scheduler.ledger.report(metadata.report)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self.scheduler.summary(request.request_id)

    # Worker side ------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.runtime = build_runtime(self._vllm_config, self._kv_cache_config, kv_caches)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(kv_connector_metadata, SentenceKVConnectorMetadata)
        assert self.runtime is not None, "KV caches are registered before the first step"
        self.runtime.apply(kv_connector_metadata.message)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        request_ids = kwargs.get("request_ids")  # in batch order; the V1 runner tells nothing
        if self.runtime is not None and request_ids is not None:
            self.runtime.set_batch_order(request_ids)
        self.attn_metadata = kwargs.get("attn_metadata")  # where the V2 runner replays a full graph

    def wait_for_layer_load(self, layer_name: str) -> None:
        return None

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        return None

    def wait_for_save(self) -> None:
        return None

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        if self.runtime is None:
            return None
        report = self.runtime.take_report()
        self.runtime.end_step()
        return SentenceKVWorkerMetadata(report) if report is not None else None

    def shutdown(self) -> None:
        if self.runtime is not None:
            self.runtime.close()
            self.runtime = None  # the swap pool goes with it
        if self._scheduler is not None:
            self._scheduler.close()

    # Metrics ----------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        if self._scheduler is not None:
            data = self._scheduler.stats()
        else:
            data = self.runtime.take_counters() if self.runtime is not None else {}
        return SentenceKVStats(data=data) if data else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        return SentenceKVStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> SentenceKVPromMetrics:
        return SentenceKVPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
