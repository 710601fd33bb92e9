# SPDX-License-Identifier: Apache-2.0
"""How long a request this server can hold: on the GPU, or with its history on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.platforms import current_platform

from ..config import ConfigError
from ..resolved import ResolvedConfig, blocks
from ..scheduler.visit_room import VisitRoom
from ..worker.visit_stream import VisitSideStream, VisitsInProgramOrder
from .windows import Windows


def visit_room(vllm_config: Any, resolved: ResolvedConfig) -> VisitRoom | None:
    """The formula of this server; None where every prompt must fit on the GPU.

    That is where it is switched off or the policy or the pool forbid it, where vLLM admits a
    request before all of it fits, and where windowed layers have KV cache groups of their own,
    which a visitor's promise does not count.
    """
    reserves = vllm_config.scheduler_config.scheduler_reserve_full_isl
    windowed = Windows.of(vllm_config.model_config).layers
    if not (reserves and resolved.histories_may_visit) or windowed:
        return None
    side = VisitsInProgramOrder if current_platform.is_cpu() else VisitSideStream
    return VisitRoom.of(resolved, side.halves, vllm_config.max_in_flight_tokens)


def blocks_for(vllm_config: Any, resolved: ResolvedConfig, tokens: int) -> int:
    """GPU blocks that must be there for a request of `tokens` tokens."""
    whole, room = blocks(tokens, resolved.block_size), visit_room(vllm_config, resolved)
    if room is None or whole > resolved.num_pages:
        return whole
    return min(whole, room.floor(tokens))


def check_pool(
    vllm_config: Any, resolved: ResolvedConfig, num_blocks: int, others: int = 0
) -> None:
    """At start-up: one request of max_model_len can be served.

    Args:
        num_blocks: of vLLM's pool, the null block included.
        others: that such a request takes in other KV cache groups.

    Raises:
        ConfigError: with the numbers needed.
    """
    tokens, usable = vllm_config.model_config.max_model_len, num_blocks - 1 - others
    needed = blocks_for(vllm_config, resolved, tokens)
    if needed > usable:
        windows = f" beside {others} for its windowed layers" if others else ""
        raise ConfigError(
            f"a request of max_model_len {tokens} needs {needed} KV blocks of "
            f"{resolved.block_size}, the pool has {usable}{windows}"
            f"{_on_the_host(vllm_config, resolved)}: "
            f"set --max-model-len {Capacity.of(vllm_config, resolved, usable).longest}, or give "
            "the pool more memory (--gpu-memory-utilization, --kv-cache-memory-bytes)"
        )


def _on_the_host(vllm_config: Any, resolved: ResolvedConfig) -> str:
    if visit_room(vllm_config, resolved) is None:
        return ""
    return f" and the swap pool {resolved.num_pages} pages (host_pool_gib)"


@dataclass(frozen=True)
class Capacity:
    """Tokens of the longest request, prompt and answer, by how it is served."""

    resident: int  # all of it on the GPU
    visiting: int  # its history on the host; 0: not on this server

    @classmethod
    def of(cls, vllm_config: Any, resolved: ResolvedConfig, usable: int) -> Capacity:
        """With `usable` GPU blocks."""
        room = visit_room(vllm_config, resolved)
        visiting = 0 if room is None else room.longest(usable, resolved.num_pages)
        return cls(usable * resolved.block_size, visiting)

    @property
    def longest(self) -> int:
        return max(self.resident, self.visiting)
