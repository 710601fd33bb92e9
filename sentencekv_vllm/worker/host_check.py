# SPDX-License-Identifier: Apache-2.0
"""Whether the swap pools of all workers of a machine fit into its memory, before any is filled.

On a CPU memory is taken as it is filled, hours after the start, and who takes too much is killed
without a word; on a GPU all ranks pin theirs at the same moment, so that none sees the others'.
"""

from __future__ import annotations

import logging
import math

from ..config import ConfigError
from ..resolved import ResolvedConfig
from .host_memory import GIB, available_bytes

logger = logging.getLogger(__name__)


def check_pools_fit(resolved: ResolvedConfig, workers: int, cache_bytes: int = 0) -> None:
    """Refuse pools that cannot all be filled; warn where the KV caches might take their room.

    Args:
        resolved: sizes of one worker.
        workers: of this machine: tensor-parallel ranks times engines.
        cache_bytes: of one worker's KV cache, where it lies in host memory, too.

    Raises:
        ConfigError: the pools together are larger than what is free, by MemAvailable and by the
            limits of the control groups around this process (versions 1 and 2).
    """
    available = available_bytes()
    if available is None:
        return
    pools = workers * resolved.host_pool_bytes
    if pools > available:
        raise ConfigError(
            f"host_pool_gib {resolved.config.host_pool_gib:g} of {workers} worker(s) on this "
            f"machine takes {pools / GIB:.2f} GiB, {available / GIB:.2f} GiB of host memory are "
            "free (of the machine and of the control groups around this process): set it to at "
            f"most {math.floor(100 * available / workers / GIB) / 100:.2f}"
        )
    if pools + workers * cache_bytes > available:
        logger.warning(
            "SentenceKV: swap pools of %.2f GiB and KV caches of %.2f GiB are more than the "
            "%.2f GiB of host memory that are free: if both fill up, the system ends a worker. "
            "Lower host_pool_gib or --kv-cache-memory-bytes (VLLM_CPU_KVCACHE_SPACE).",
            pools / GIB,
            workers * cache_bytes / GIB,
            available / GIB,
        )
