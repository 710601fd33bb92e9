# SPDX-License-Identifier: Apache-2.0
"""From a model, a machine and a context to the plan."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..config import SentenceKVConfig
from ..evaluation.kv_shape import KVShape
from ..resolved import GIB, ResolvedConfig, resolve
from .break_even import BreakEven, break_even
from .capacity import Capacity, Need, dense_requests, requests_with_index, sparse_requests
from .error import PlanError
from .machine import Machine
from .model_shape import ModelShape


@dataclass(frozen=True)
class Plan:
    """Sizes of one worker; `resolved` is what a server with these settings would settle."""

    model: ModelShape
    machine: Machine
    context: int  # tokens of prompt and answer
    resolved: ResolvedConfig
    block_bytes: int  # KV of one block in the cache, all layers
    kv_bytes: int  # of the KV cache
    need: Need
    capacity: Capacity
    break_even: BreakEven

    @property
    def kv_token_bytes(self) -> int:
        return self.block_bytes // self.resolved.block_size

    @property
    def index_token_bytes(self) -> float:
        return self.resolved.index_page_bytes / self.resolved.block_size

    @property
    def host_bytes(self) -> int:
        """Swap pools of all workers."""
        return self.machine.tensor_parallel * self.resolved.host_pool_bytes


def make_plan(
    model: ModelShape,
    machine: Machine,
    context: int,
    config: SentenceKVConfig,
    block_size: int,
    pool_is_given: bool = False,
) -> Plan:
    """Size the swap pool for as many requests as fit, and count them.

    Args:
        config: settings; its `host_pool_gib` is replaced unless `pool_is_given`.
        block_size: tokens.

    Raises:
        ConfigError: the settings do not fit the model.
        PlanError: the context is longer than the model's, or heads do not divide.
    """
    _check(model, machine, context)
    heads = model.kv_heads_of_rank(machine.tensor_parallel)
    shape = KVShape(model.head_dim, block_size, model.element_bytes)
    block_bytes = shape.head_block_bytes * heads * model.num_layers
    device_bytes = machine.bytes_for_kv(model.weight_bytes)

    def settled(pool_gib: float) -> ResolvedConfig:
        return resolve(
            replace(config, host_pool_gib=pool_gib),
            block_size=block_size,
            num_kv_heads=heads,
            head_dim=model.head_dim,
            num_layers=model.num_layers,
            dtype_size=model.element_bytes,
        )

    if pool_is_given:
        resolved = settled(config.host_pool_gib)
        need = Need.of(context, resolved, machine)
    else:
        most = math.floor(100 * machine.pool_bytes / GIB) / 100
        if not most:
            raise PlanError(
                f"{machine.host_bytes / GIB:.2f} GiB of host memory for {machine.tensor_parallel} "
                "worker(s) hold no swap pool: give --host-memory-gib more"
            )
        largest = settled(most)
        need = Need.of(context, largest, machine)
        fitting = _fit(need, largest, block_bytes, machine, device_bytes)
        wanted = math.ceil(100 * fitting * need.host_pages * largest.page_bytes / GIB) / 100
        resolved = settled(min(most, wanted)) if fitting else largest
    kv_bytes = machine.bytes_for_kv(model.weight_bytes, resolved.index_bytes)
    kv_blocks = kv_bytes // block_bytes
    by_host = resolved.num_pages // max(1, need.host_pages)
    by_gpu = sparse_requests(need, kv_blocks)
    capacity = Capacity(
        kv_blocks=kv_blocks,
        dense_requests=dense_requests(need, device_bytes // block_bytes),
        sparse_requests=min(by_gpu, by_host),
        limited_by="swap pool" if by_host < by_gpu else "KV blocks of the GPU",
    )
    even = break_even(context, need, resolved, block_bytes, machine)
    found = (model, machine, context, resolved, block_bytes, kv_bytes, need, capacity, even)
    return Plan(*found)


def _fit(
    need: Need, resolved: ResolvedConfig, block_bytes: int, machine: Machine, device_bytes: int
) -> int:
    if machine.kv_cache_bytes is None:
        return requests_with_index(need, resolved, block_bytes, device_bytes)
    return sparse_requests(need, device_bytes // block_bytes)


def _check(model: ModelShape, machine: Machine, context: int) -> None:
    if not 1 <= context <= model.max_context:
        raise PlanError(
            f"--context must be from 1 to the model's {model.max_context} tokens, got {context}: "
            f"set it to at most {model.max_context}"
        )
    ranks = machine.tensor_parallel
    if ranks < 1 or model.num_query_heads % ranks:
        raise PlanError(
            f"--tensor-parallel must divide the model's {model.num_query_heads} heads, got "
            f"{ranks}: set it to 1 or another divisor"
        )
