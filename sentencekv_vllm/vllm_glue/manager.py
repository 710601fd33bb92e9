# SPDX-License-Identifier: Apache-2.0
"""KV cache manager: the one place that can free a running request's blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from ..scheduler.ledger import Ledger
from ..scheduler.visiting import FreeBlocks


def reuse_up_to(kv_cache_manager: Any, limit: Callable[[str, int], int]) -> None:
    """Let a request take no more cached tokens than `limit(request_id, found)`.

    vLLM has no hook for it: hits are looked up by hash, before any manager sees the request.
    What stands behind the request (0.33: a limit of vLLM's own) is handed on.

    Raises:
        ValueError: vLLM's look-up does not take the request first.
    """
    look_up = kv_cache_manager.get_computed_blocks
    parameters = tuple(inspect.signature(look_up).parameters)
    if parameters[:1] != ("request",):
        raise ValueError(
            "sentencekv expects vLLM's KVCacheManager.get_computed_blocks(request, ...) and found "
            f"{parameters}: install a vLLM version that sentencekv_vllm is tested with"
        )

    def limited(request: Request, *limits: Any, **named: Any) -> tuple[KVCacheBlocks, int, int]:
        found, num_tokens, boundary = look_up(request, *limits, **named)
        allowed = limit(request.request_id, num_tokens)
        if allowed >= num_tokens:
            return found, num_tokens, boundary
        # Looked up anew, not cut: what a windowed group keeps for a shorter hit is no part of what
        # it keeps for a longer one.
        blocks, num_tokens, uncached = kv_cache_manager.coordinator.find_longest_cache_hit(
            request.block_hashes, allowed
        )
        boundary = num_tokens + uncached if uncached else 0
        return kv_cache_manager.create_kv_cache_blocks(blocks), num_tokens, boundary

    kv_cache_manager.get_computed_blocks = limited


def cache_up_to(kv_cache_manager: Any, limit: Callable[[str, int], int]) -> None:
    """Let no KV cache group, ours or another, cache more than `limit(request_id, computed)`
    tokens: behind the first sparse token the keys and states of all layers are approximate."""
    coordinator = kv_cache_manager.coordinator
    cache = coordinator.cache_blocks

    def limited(request: Request, num_computed_tokens: int) -> None:
        cache(request, limit(request.request_id, num_computed_tokens))

    coordinator.cache_blocks = limited


class SentenceKVManager(FullAttentionManager):
    """Full attention plus the ledger's decisions.

    One `allocate_slots` call of a request asks, in this order: `remove_skipped_blocks` (copy
    orders go out, history is freed), `get_num_blocks_to_allocate` (the working set is added
    once), `allocate_new_blocks` (it is drawn). So turning sparse needs no memory that it has
    not just freed, unless blocks are shared.
    """

    def __init__(self, kv_cache_spec: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.ledger: Ledger | None = None  # the connector binds it before the first request
        self._private: dict[str, list[KVCacheBlock]] = {}

    def bind(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def block_id(self, request_id: str, index: int) -> int:
        return int(self.req_to_blocks[request_id][index].block_id)

    def new_step_starts(self) -> None:
        super().new_step_starts()
        if self.ledger is not None:
            self.ledger.new_step()

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        blocks = self.req_to_blocks.get(request_id)
        if self.ledger is None or not blocks:
            return
        freed = self.ledger.advance(
            request_id,
            processed_computed_tokens,
            blocks,
            self.block_pool.get_num_free_blocks(),
        )
        if freed is not None:
            self._remove_blocks_in_range(request_id, *freed)
        private = self._private.get(request_id)
        if private and len(private) > (kept := self.ledger.private_blocks(request_id)):
            self.block_pool.free_blocks(private[kept:])  # a visitor's staging, once it is sparse
            del private[kept:]

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        needed: int = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )
        if self.ledger is None:
            return needed
        free = self.block_pool.get_num_free_blocks()
        if apply_admission_cap:
            found, pool = len(new_computed_blocks), self.free_blocks(request_id)
            wanted = self.ledger.blocks_at_admission(request_id, needed, found, pool)
            if wanted is None:
                return int(self.block_pool.num_gpu_blocks) + 1  # more than there are: wait
            needed = wanted
        else:
            needed += self.ledger.missing_private_blocks(request_id)
            needed += self.ledger.promised_to_others(request_id, self._held)
        self.ledger.note_need(needed, free)
        return needed

    @property
    def usable_blocks(self) -> int:
        return int(self.block_pool.num_gpu_blocks) - 1  # one is vLLM's null block

    def free_blocks(self, request_id: str) -> FreeBlocks:
        """The pool as a waiting request sees it."""
        assert self.ledger is not None
        free = self.block_pool.get_num_free_blocks()
        return self.ledger.free_blocks(request_id, free, self.usable_blocks, self._held)

    def _held(self, request_id: str) -> int:
        own = self.req_to_blocks.get(request_id, ())
        return len(own) + len(self._private.get(request_id, ()))

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        if self.ledger is not None:
            self.ledger.reserve(request_id)
            missing = self.ledger.missing_private_blocks(request_id)
            if missing:
                # A side table: never hashed, never in the request's block table.
                private = self.block_pool.get_new_blocks(missing)
                self._private[request_id] = private
                self.ledger.set_private_blocks(request_id, [b.block_id for b in private])
        new_blocks: list[KVCacheBlock] = super().allocate_new_blocks(
            request_id, num_tokens, num_tokens_main_model
        )
        return new_blocks

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        if self.ledger is not None:
            self.ledger.release(request_id)
        return blocks + self._private.pop(request_id, [])
