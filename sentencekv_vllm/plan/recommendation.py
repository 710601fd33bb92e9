# SPDX-License-Identifier: Apache-2.0
"""A plan as the configuration of a server."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields
from typing import Any

import yaml

from ..config import SentenceKVConfig
from .making import Plan

MOST_REQUESTS = 256  # vLLM's own --max-num-seqs where memory would allow more


def settings(plan: Plan) -> dict[str, Any]:
    """Ours, where they are not at their defaults."""
    config, defaults = plan.resolved.config, SentenceKVConfig()
    names = [f.name for f in fields(config)]
    changed = {n: getattr(config, n) for n in names if getattr(config, n) != getattr(defaults, n)}
    return {"token_budget": config.token_budget, "host_pool_gib": config.host_pool_gib} | changed


def arguments(plan: Plan) -> dict[str, Any]:
    """Of `vllm serve`, as its configuration file has them."""
    machine = plan.machine
    found: dict[str, Any] = {
        "attention-backend": "sentencekv",
        "block-size": plan.resolved.block_size,
        "dtype": plan.model.dtype,
        "max-model-len": plan.context,
        "max-num-batched-tokens": machine.chunk_tokens,
        "max-num-seqs": max(1, min(MOST_REQUESTS, plan.capacity.sparse_requests)),
    }
    if machine.tensor_parallel > 1:
        found["tensor-parallel-size"] = machine.tensor_parallel
    if machine.kv_cache_bytes is not None:
        found["kv-cache-memory-bytes"] = machine.kv_cache_bytes
    else:
        found["gpu-memory-utilization"] = machine.gpu_share(plan.resolved.index_bytes)
    return {**found, "additional-config": {"sentencekv": settings(plan)}}


def as_yaml(plan: Plan) -> str:
    """A file for `vllm serve MODEL --config FILE`."""
    return (
        f"# {plan.model.name}: {plan.capacity.sparse_requests} requests of {plan.context} tokens "
        f"at once, {plan.capacity.dense_requests} if all were dense\n"
        + str(yaml.safe_dump(arguments(plan), sort_keys=False))
    )


def command(plan: Plan) -> str:
    """The same on the command line."""
    words = ["vllm", "serve", plan.model.name]
    for name, value in arguments(plan).items():
        words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return shlex.join(words)
