# SPDX-License-Identifier: Apache-2.0
"""The worker's model, which no interface of vLLM's hands to a backend or a connector.

`GPUModelRunner.initialize_kv_cache`, of the V1 and of the V2 runner, is where a connector gets the
KV caches. It is wrapped when the first attention layer is made, and remembers its runner.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from .full_graphs import wrap

PARAMETERS = ("self", "kv_cache_config", "is_profiling", "kv_cache_allocation_context")

_runner: Callable[[], Any] = lambda: None  # noqa: E731  # a weak reference


def install(vllm_config: Any) -> None:
    """Wrap the runner that this configuration uses, once a process.

    Raises:
        ValueError: vLLM's function is not the one that we know.
    """
    if vllm_config.use_v2_model_runner:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    else:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    wrap(GPUModelRunner, "initialize_kv_cache", PARAMETERS, _initialize_kv_cache)


def current_model() -> Any:
    """The model of the worker whose KV caches are being made; None where there is none."""
    runner = _runner()
    return None if runner is None else runner.get_model()


def _initialize_kv_cache(
    original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any
) -> Any:
    global _runner
    _runner = weakref.ref(runner)
    return original(runner, *args, **kwargs)
