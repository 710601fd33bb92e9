# SPDX-License-Identifier: Apache-2.0
"""The scheduler process: vLLM's requests in, the ledger's messages out."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import numpy as np
from vllm.config import VllmConfig

from ..messages import DecodeOptions, Int32s, StepMessage
from ..metrics import REASON_PREFIX, SEGMENTER_PREFIX
from ..request_options import RequestOptions, RequestOptionsError
from ..resolved import ResolvedConfig
from ..scheduler.ledger import Ledger
from ..scheduler.limits import Limits
from ..scheduler.page_pool import PagePool
from ..scheduler.reasons import Reason
from ..scheduler.request_state import RequestState
from ..segmentation.service import SegmentationService
from .manager import SentenceKVManager, reuse_up_to
from .resolve import load_vocabulary, resolve_for_engine
from .visit_room import check_pool, visit_room

logger = logging.getLogger(__name__)

FIRST_GUESS_PREFILL_RATE = 10_000.0  # tokens a second, until one was seen
ROOMY = 0.1  # of all GPU blocks; fewer free ones are no room


class PacedSegmentation:
    """Tells the segmentation service how long each prompt's prefill will take."""

    def __init__(self, service: SegmentationService) -> None:
        self.service = service
        self._rate = FIRST_GUESS_PREFILL_RATE
        self._last = (time.monotonic(), 0)
        self.drop = service.drop
        self.is_boundary = service.is_boundary
        self.poll = service.poll
        self.split_tail = service.split_tail

    def submit(self, request_id: str, token_ids: Int32s) -> None:
        self.service.submit(request_id, token_ids, allowed_delay_s=len(token_ids) / self._rate)

    def step_scheduled(self, num_tokens: int) -> None:
        """Learn the prefill rate from large steps."""
        now = time.monotonic()
        (before, tokens), self._last = self._last, (now, num_tokens)
        if tokens >= 256:
            self._rate += 0.2 * (tokens / max(now - before, 1e-6) - self._rate)


class SchedulerSide:
    """Owns the ledger."""

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: Any) -> None:
        self.resolved: ResolvedConfig = resolve_for_engine(vllm_config, kv_cache_config)
        resolved, config = self.resolved, self.resolved.config
        scheduler = vllm_config.scheduler_config
        check_pool(vllm_config, resolved, kv_cache_config.num_blocks)
        limits = Limits(
            block_size=resolved.block_size,
            sink_blocks=resolved.sink_blocks,
            recent_tokens=config.recent_window,
            working_set_blocks=resolved.working_set_blocks,
            rows_per_page=resolved.rows_per_page,
            min_context_tokens=config.min_context_tokens,
            copy_blocks_per_step=max(1, scheduler.max_num_batched_tokens // resolved.block_size),
            num_slots=scheduler.max_num_seqs,
            stay_dense_when_covered=config.stay_dense_when_covered,
            wait_for_pages=config.on_pool_full == "wait",
            min_context_tokens_with_room=config.min_context_tokens_with_room or 0,
            roomy_blocks=int(ROOMY * kv_cache_config.num_blocks),
            exact_pages=resolved.host_format is None,
            visit_room=visit_room(vllm_config, resolved),
        )
        self._service = SegmentationService(
            config.segmenter,
            load_vocabulary(vllm_config),
            min_sentence_tokens=config.min_sentence_tokens,
            max_sentence_tokens=config.max_sentence_tokens,
            fixed_length=config.fixed_sentence_tokens,
        )
        self._service.warm_up()
        self._segmentation = PacedSegmentation(self._service)
        self.ledger = Ledger(limits, PagePool(resolved.num_pages), self._segmentation)
        self._manager: SentenceKVManager | None = None
        self._reported: dict[str, int] = {}

    def bind(self, kv_cache_manager: Any) -> None:
        managers = kv_cache_manager.coordinator.single_type_managers
        if len(managers) != 1 or not isinstance(managers[0], SentenceKVManager):
            raise ValueError(
                "sentencekv needs one KV cache group of full-attention layers, found "
                f"{[type(m).__name__ for m in managers]}: hybrid and sliding-window models are "
                "not supported. Use another attention backend for this model."
            )
        self._manager = managers[0]
        self._manager.bind(self.ledger)
        reuse_up_to(kv_cache_manager, self._reusable_tokens)

    def _reusable_tokens(self, request_id: str, num_tokens: int) -> int:
        assert self._manager is not None, "bound before the first request"
        n = self.resolved.block_size
        pool = self._manager.free_blocks(request_id)
        blocks = self.ledger.reusable_blocks(request_id, num_tokens // n, pool)
        return min(self.ledger.reusable_tokens(request_id, num_tokens), blocks * n)

    def must_wait(self, request_id: str) -> bool:
        """The request waits for host pages; others are admitted past it."""
        assert self._manager is not None, "bound before the first request"
        usable = self._manager.free_blocks(request_id).usable
        return self.ledger.waits_for_pages(request_id, usable)

    def add(self, request: Any) -> None:
        """A request has arrived; a bad option was refused before it got here."""
        reason, options, keeps_all = Reason.SHORT_CONTEXT, None, False
        if request.prompt_token_ids is None or getattr(request, "resumable", False):
            reason = Reason.UNSUPPORTED_INPUT
        else:
            reason, options, keeps_all = self._options(request)
        params = request.sampling_params
        short = params is not None and params.max_tokens == 1
        self.ledger.add(
            RequestState(
                request_id=request.request_id,
                request=request,
                tokens=lambda a, b: np.asarray(request.all_token_ids[a:b], np.int32),
                options=options,
                keeps_all=keeps_all,
                reason=reason,
                short_answer=short,
                warm_start=not short
                and self.resolved.config.warm_start
                and options is not None
                and not options.compacts,
            )
        )

    def _options(self, request: Any) -> tuple[Reason, DecodeOptions | None, bool]:
        params = request.sampling_params
        extra = params.extra_args if params is not None else None
        try:
            wanted = RequestOptions.parse(extra, self.resolved)
        except RequestOptionsError as error:
            logger.warning("request %s decodes densely: %s", request.request_id, error)
            return Reason.SWITCHED_OFF, None, False
        if not wanted.enabled:
            return Reason.SWITCHED_OFF, None, False
        policy = wanted.policy
        if policy.keeps_all and self.resolved.config.stay_dense_when_covered:
            return Reason.POLICY_FULL, None, False
        options = DecodeOptions(
            index_kind=int(policy.index or 0),
            reduce=int(policy.reduce),
            retention=policy.retention,
            query_kind=int(policy.query),
            budget_blocks=wanted.budget_blocks,
            seed=(params.seed or 0) % 2**31 if params is not None else 0,
            byte_rows=wanted.byte_rows,
            block_groups=policy.grouping == "blocks",
            settlement=policy.settlement,
            opening_blocks=min(
                math.ceil(policy.opening * wanted.budget_blocks), self.resolved.working_set_blocks
            ),
            layer_blocks=wanted.layer_blocks,
            estimates=policy.estimate,
        )
        return Reason.SHORT_CONTEXT, options, policy.keeps_all

    def message(self, scheduler_output: Any) -> StepMessage:
        assert self._manager is not None, "bound before the first step"
        scheduled = {r.req_id: r.num_computed_tokens for r in scheduler_output.scheduled_new_reqs}
        cached = scheduler_output.scheduled_cached_reqs
        scheduled.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        self._segmentation.step_scheduled(scheduler_output.total_num_scheduled_tokens)
        return self.ledger.take_message(
            scheduled, self._manager.block_id, scheduler_output.num_scheduled_tokens
        )

    def summary(self, request_id: str) -> dict[str, Any] | None:
        state = self.ledger.states.get(request_id)
        return None if state is None else {"sentencekv": state.summary()}

    def stats(self) -> dict[str, int]:
        """Levels that have changed, and what has been counted, since the last call."""
        counts = {f"{REASON_PREFIX}{k}": v for k, v in self.ledger.finished.items()}
        counts |= {f"{SEGMENTER_PREFIX}{k}": v for k, v in self._service.stats.items()}
        counts["visitors"] = self.ledger.visitors
        counts["joined_sentences"] = self.ledger.joined_sentences
        counts["released_blocks"] = self.ledger.blocks_released
        levels = self.ledger.gauges()
        data = {k: v for k, v in levels.items() if v != self._reported.get(k)}
        data |= {k: new for k, v in counts.items() if (new := v - self._reported.get(k, 0))}
        self._reported = levels | counts
        return data

    def close(self) -> None:
        self._service.close()
