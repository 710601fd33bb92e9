# SPDX-License-Identifier: Apache-2.0
"""The engine that a command line asks for, and what identifies its results."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..policies import POLICIES
from .engine import Engine, VllmEngine
from .http_engine import HttpEngine
from .kv_shape import KVShape
from .real.tasks import REAL_TASKS, Sources
from .variant import Variant


def identity(options: argparse.Namespace) -> dict[str, Any]:
    """What all records of a file must share."""
    asked = set(options.tasks) & set(REAL_TASKS)
    texts = {"real_texts": sources(options).digest()} if asked else {}
    if options.server:
        return {"server": options.server, **texts}
    model = Path(options.model)
    name = model.name if model.is_dir() else options.model
    dtype = {} if options.dtype == "auto" else {"dtype": options.dtype}
    found = {"model": name, "block_size": options.block_size, **dtype}
    return {**found, **_settings(options), **texts}


def sources(options: argparse.Namespace) -> Sources:
    """Of the real tasks."""
    return Sources(options.model, options.text_folder, options.code_folder)


def longest_prompt(options: argparse.Namespace) -> int:
    """Tokens."""
    return int(options.max_prompt_tokens or max(options.contexts))


def longest_reply(options: argparse.Namespace) -> int:
    """Tokens, forced ones included."""
    return 2048 if options.data else 512


def kv_shape(options: argparse.Namespace) -> KVShape | None:
    """None where the model's configuration is not at hand."""
    shape = KVShape.of_model(Path(options.model), options.block_size)
    return replace(shape, element_bytes=4) if shape and options.dtype == "float32" else shape


def history_tokens(options: argparse.Namespace) -> Callable[[int], int] | None:
    """From a budget: tokens of the history that it selects, in whole blocks. None where sinks and
    recent window are not known."""
    if options.server:
        return None
    kept, size = options.sinks + options.recent, options.block_size
    return lambda budget: -(-(budget - kept) // size) * size


def start(options: argparse.Namespace, variants: Sequence[Variant]) -> Engine:
    """An engine that takes requests of all variants; ten seconds unless a server runs already."""
    if options.server:
        return HttpEngine(options.server, options.requests)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if options.processes > 1:  # vLLM would bind all engines to the same core
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    settings = {
        "token_budget": max(options.budgets),
        **_room(variants),
        "host_pool_gib": options.host_pool_gib,
        **_settings(options),
        **dict(options.set),
    }
    return VllmEngine(
        options.model,
        settings,
        block_size=options.block_size,
        max_prompt_tokens=longest_prompt(options),
        max_requests=options.requests,
        max_output_tokens=longest_reply(options),
        kv_cache_bytes=int(options.kv_cache_gib * 2**30),
        dtype=options.dtype,
    )


def _room(variants: Sequence[Variant]) -> dict[str, int | bool]:
    """What a server must have been started with for all these requests."""
    settlements = [POLICIES[variant.policy].settlement for variant in variants if variant.policy]
    return {
        "index_codes": True,
        "index_vectors": max((variant.vectors for variant in variants), default=0),
        "observation_window": max((s.window for s in settlements if s), default=0),
    }


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """`additional_config["sentencekv"]` as far as it may change an answer; requests bring the
    budget."""
    return {
        "num_sink_tokens": options.sinks,
        "recent_window": options.recent,
        "working_set_tokens": options.working_set,
        "min_context_tokens": 512,
        "segmenter": options.segmenter,
    }
