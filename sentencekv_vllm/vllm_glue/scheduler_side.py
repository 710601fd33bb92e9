# SPDX-License-Identifier: Apache-2.0
"""The scheduler process: vLLM's requests in, the ledger's messages out."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
from vllm.config import VllmConfig

from ..in_force import in_force
from ..messages import DecodeOptions, StepMessage
from ..metrics import REASON_PREFIX, SEGMENTER_PREFIX
from ..request_options import RequestOptions, RequestOptionsError
from ..resolved import ResolvedConfig
from ..scheduler.ledger import Ledger
from ..scheduler.limits import Limits
from ..scheduler.page_pool import PagePool
from ..scheduler.reasons import Reason
from ..scheduler.request_state import RequestState
from ..segmentation.service import SegmentationService
from ..types import IndexKind
from .groups import blocks_of_others, our_group, our_manager
from .manager import SentenceKVManager, cache_up_to, reuse_up_to
from .resolve import load_vocabulary, resolve_for_engine
from .visit_room import check_pool, visit_room

logger = logging.getLogger(__name__)
# By a name below vLLM's, whose handlers show what is said at the level of information.
log = logging.getLogger("vllm.sentencekv")

ROOMY = 0.1  # of all GPU blocks; fewer free ones are no room


class SchedulerSide:
    """Owns the ledger."""

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: Any) -> None:
        group = our_group(kv_cache_config)
        self.resolved: ResolvedConfig = resolve_for_engine(vllm_config, group)
        resolved, config = self.resolved, self.resolved.config
        scheduler = vllm_config.scheduler_config
        others = blocks_of_others(vllm_config, kv_cache_config)
        check_pool(vllm_config, resolved, kv_cache_config.num_blocks, others)
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
            blocks_a_step=len(kv_cache_config.kv_cache_groups),
        )
        self._service = SegmentationService(
            config.segmenter,
            load_vocabulary(vllm_config),
            min_sentence_tokens=config.min_sentence_tokens,
            max_sentence_tokens=config.max_sentence_tokens,
            fixed_length=config.fixed_sentence_tokens,
        )
        self._service.warm_up()
        self.ledger = Ledger(limits, PagePool(resolved.num_pages), self._service)
        self._manager: SentenceKVManager | None = None
        self._reported: dict[str, int] = {}
        log.info("%s", in_force(resolved))

    def bind(self, kv_cache_manager: Any) -> None:
        self._manager = our_manager(kv_cache_manager)
        self._manager.bind(self.ledger)
        reuse_up_to(kv_cache_manager, self._reusable_tokens)
        cache_up_to(kv_cache_manager, self.ledger.exact_tokens)

    def _reusable_tokens(self, request_id: str, num_tokens: int) -> int:
        assert self._manager is not None, "bound before the first request"
        n = self.resolved.block_size
        pool = self._manager.free_blocks(request_id)
        blocks = self.ledger.reusable_blocks(request_id, num_tokens // n, pool)
        return min(self.ledger.reusable_tokens(request_id, num_tokens), blocks * n)

    def steps_aside(self, request_id: str) -> bool:
        """The request waits for host pages, and others are admitted past it."""
        assert self._manager is not None, "bound before the first request"
        return self.ledger.steps_aside(request_id, self._manager.usable_blocks)

    def add(self, request: Any) -> None:
        """A request has arrived; a bad option was refused before it got here."""
        reason, options, keeps_all = Reason.SHORT_CONTEXT, None, False
        if request.prompt_token_ids is None or request.resumable or request.mm_features:
            reason = Reason.UNSUPPORTED_INPUT
        else:
            reason, options, keeps_all = self._options(request)
        params, config = request.sampling_params, self.resolved.config
        short = options is not None and params is not None and params.max_tokens == 1
        if short and request.num_prompt_tokens >= config.min_context_tokens:
            reason = Reason.SHORT_ANSWER
        state = RequestState(
            request_id=request.request_id,
            request=request,
            tokens=lambda a, b: np.asarray(request.all_token_ids[a:b], np.int32),
            options=options,
            keeps_all=keeps_all,
            reason=reason,
            short_answer=short,
            warm_start=config.warm_start
            and options is not None
            and not (short or options.compacts),
        )
        self.ledger.add(state)
        self._segment(state)

    def _segment(self, state: RequestState) -> None:
        """Begin at arrival: spaCy is then at work while the request waits and is prefilled, and
        has begun before a prefix hit leaves no prefill to work beside."""
        prompt = state.request.num_prompt_tokens
        if state.options is None or state.block_groups:
            return
        if prompt >= self.resolved.config.min_context_tokens:
            self._service.submit(state.request_id, state.tokens(0, prompt))
            state.segmentation = "submitted"

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
            index_kind=int(IndexKind.RANDOM if policy.index is None else policy.index),
            reduce=int(policy.reduce),
            retention=policy.retention,
            query_kind=int(policy.query),
            budget_blocks=wanted.budget_blocks,
            seed=(params.seed or 0) % 2**31 if params is not None else 0,
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
        counts["visitors"] = self.ledger.admission.visitors
        counts["joined_sentences"] = self.ledger.joined_sentences
        counts["released_blocks"] = self.ledger.blocks_released
        levels = self.ledger.gauges() | {"index_bytes": self.resolved.index_bytes}
        data = {k: v for k, v in levels.items() if v != self._reported.get(k)}
        data |= {k: new for k, v in counts.items() if (new := v - self._reported.get(k, 0))}
        self._reported = levels | counts
        return data

    def close(self) -> None:
        self._service.close()
