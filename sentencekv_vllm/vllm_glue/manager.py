# SPDX-License-Identifier: Apache-2.0
"""KV cache manager: the one place that can free a running request's blocks."""

from __future__ import annotations

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
    """
    look_up = kv_cache_manager.get_computed_blocks

    def limited(request: Request) -> tuple[KVCacheBlocks, int, int]:
        found, num_tokens, boundary = look_up(request)
        allowed = limit(request.request_id, num_tokens)
        if allowed >= num_tokens:
            return found, num_tokens, boundary
        block_size = kv_cache_manager.coordinator.single_type_managers[0].block_size
        blocks = allowed // block_size
        fewer = kv_cache_manager.create_kv_cache_blocks(tuple(g[:blocks] for g in found.blocks))
        return fewer, blocks * block_size, boundary

    kv_cache_manager.get_computed_blocks = limited


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
            pool = self.free_blocks(request_id)
            found = len(new_computed_blocks)
            wanted = self.ledger.blocks_at_admission(request_id, needed, found, pool)
            if wanted is None:
                return int(self.block_pool.num_gpu_blocks) + 1  # more than there are: wait
            needed = wanted + free - pool.free  # what visitors were promised is theirs
        else:
            needed += self.ledger.missing_private_blocks(request_id)
        self.ledger.note_need(needed, free)
        return needed

    def free_blocks(self, request_id: str) -> FreeBlocks:
        """The pool as a waiting request sees it."""

        def held(other: str) -> int:
            own = self.req_to_blocks.get(other, ())
            return len(own) + len(self._private.get(other, ()))

        assert self.ledger is not None
        promised = self.ledger.promised_blocks(request_id, held)
        free = self.block_pool.get_num_free_blocks() - promised
        return FreeBlocks(free, self.block_pool.num_gpu_blocks - 1)

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

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        if self.ledger is not None:
            num_tokens = self.ledger.exact_tokens(request.request_id, num_tokens)
        super().cache_blocks(
            request,
            num_tokens,
            retention_interval=retention_interval,
            replay_boundaries=replay_boundaries,
        )

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        if self.ledger is not None:
            self.ledger.release(request_id)
        return blocks + self._private.pop(request_id, [])
