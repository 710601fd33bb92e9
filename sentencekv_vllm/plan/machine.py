# SPDX-License-Identifier: Apache-2.0
"""What the plan needs to know of the machine, and what it takes for granted."""

from __future__ import annotations

import math
from dataclasses import dataclass

GIB = 2**30
GPU_SHARE = 0.92  # vLLM's own --gpu-memory-utilization
HOST_SHARE = 0.9  # of the host's free memory, for the swap pools of all workers
RESERVE_BYTES = 3 * GIB  # activations, CUDA graphs and the context of the driver; an assumption
CHUNK_TOKENS = 8192  # vLLM's own on GPUs of 70 GiB and more
DEVICE_BANDWIDTH = 4.8e12  # bytes/s, by the data sheet of an H200
LINK_BANDWIDTH = 50e9  # bytes/s, what swap-in reached on one (docs/performance.md)


@dataclass(frozen=True)
class Machine:
    """One worker has a GPU of its own and a share of the host's memory."""

    gpu_bytes: int  # of one GPU
    host_bytes: int  # free, of the host
    tensor_parallel: int = 1
    kv_cache_bytes: int | None = None  # of one worker; None: what the GPU's memory leaves
    device_bandwidth: float = DEVICE_BANDWIDTH  # bytes/s
    link_bandwidth: float = LINK_BANDWIDTH  # bytes/s, from host to device
    chunk_tokens: int = CHUNK_TOKENS  # of a prefill step: --max-num-batched-tokens
    batches_in_flight: int = 2  # asynchronous scheduling
    staging_halves: int = 2  # copies beside attention; 1 on a CPU, see scheduler/visit_room

    @property
    def pool_bytes(self) -> int:
        """Largest swap pool of one worker."""
        return int(HOST_SHARE * self.host_bytes) // self.tensor_parallel

    def gpu_share(self, index_bytes: int = 0) -> float:
        """`--gpu-memory-utilization` that leaves room for an index beside what vLLM takes, rounded
        down to a hundredth."""
        share = GPU_SHARE - index_bytes / self.gpu_bytes
        return max(0.01, math.floor(round(100 * share, 6)) / 100)

    def bytes_for_kv(self, weight_bytes: int, index_bytes: int = 0) -> int:
        """What one GPU has for KV blocks, beside its share of the weights and an index."""
        if self.kv_cache_bytes is not None:
            return self.kv_cache_bytes
        weights = weight_bytes // self.tensor_parallel
        taken = int(self.gpu_share(index_bytes) * self.gpu_bytes)
        return max(0, taken - weights - RESERVE_BYTES)
