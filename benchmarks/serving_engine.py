# SPDX-License-Identifier: Apache-2.0
"""One engine of each side with equal settings: behind `vllm serve`, or offline in a process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving_model import Model

SIDES = ("stock", "sentencekv")
HOST_POOL_SLACK = 1.25  # sentences shorter than planned take pages for their rows


@dataclass(frozen=True)
class Case:
    """One load: `requests` prompts of `context` tokens, at most `concurrency` at a time."""

    context: int
    concurrency: int
    requests: int
    output_tokens: int

    @property
    def tokens(self) -> int:
        """Of one request at its end."""
        return self.context + self.output_tokens


@dataclass(frozen=True)
class Setup:
    """What both engines of a run share, and what only ours is told."""

    block_size: int
    dense_requests: float  # longest requests that the KV pool holds
    batched_tokens: int  # most tokens of an engine step
    eager: bool
    settings: dict[str, Any]  # additional_config["sentencekv"]


def host_gib(model: Model, case: Case) -> float:
    """Swap pool that holds every request of a load at once, in GiB."""
    return HOST_POOL_SLACK * case.concurrency * case.tokens * model.token_bytes / 2**30


def free_host_gib() -> float:
    """Memory that programs could take without swapping, in GiB."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    raise OSError("/proc/meminfo does not tell MemAvailable")


def engine_options(model: Model, setup: Setup, cases: list[Case], side: str) -> dict[str, Any]:
    """Arguments of vLLM's engine, by their Python names.

    The KV pool has the same bytes on both sides: blocks of `dense_requests` longest requests,
    and vLLM's null block.
    """
    longest = max(case.tokens for case in cases)
    blocks = round(setup.dense_requests * -(-longest // setup.block_size)) + 1
    options: dict[str, Any] = {
        "block_size": setup.block_size,
        "kv_cache_memory_bytes": blocks * setup.block_size * model.token_bytes,
        "max_model_len": longest,
        "max_num_seqs": max(case.concurrency for case in cases),
        "max_num_batched_tokens": setup.batched_tokens,
        "seed": 0,
    }
    if setup.eager:
        options["enforce_eager"] = True
    if not model.has_weights:
        options["load_format"] = "dummy"
    if side == "sentencekv":
        pool = max(host_gib(model, case) for case in cases)
        settings = {"host_pool_gib": round(pool + 0.01, 2), **setup.settings}
        options["attention_backend"] = "sentencekv"
        options["additional_config"] = {"sentencekv": settings}
    return options


def serve_arguments(options: dict[str, Any]) -> list[str]:
    """The same options as arguments of `vllm serve`."""
    arguments = []
    for name, value in options.items():
        arguments.append(f"--{name.replace('_', '-')}")
        if value is not True:
            arguments.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return arguments
