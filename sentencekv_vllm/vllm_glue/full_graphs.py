# SPDX-License-Identifier: Apache-2.0
"""Steps with sparse rows never replay vLLM's CUDA graphs of the whole model.

Such a graph holds stock attention alone. vLLM chooses the graph before the forward: the V2
runner by the uniform number of tokens that `gather_batch_req_state` returns, the V1 runner
in `CudagraphDispatcher.dispatch`. Both are wrapped, and a step with sparse rows is offered to
the other graphs only (piecewise ones, or none), unless `step_graphs` has one for it. All ranks
have the same message, so all choose alike; data-parallel ranks agree on the answer in the same
way as on any other batch.

Where vLLM keeps them: v1/worker/gpu/model_runner.py (GPUModelRunner.gather_batch_req_state,
execute_model), v1/cudagraph_dispatcher.py (CudagraphDispatcher.dispatch).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from vllm.config import CUDAGraphMode

from . import step_graphs
from .metadata import current_runtime

V2_PARAMETERS = ("self", "scheduler_output", "dummy_run")
V1_PARAMETERS = (
    *("self", "num_tokens", "uniform_decode", "has_lora", "num_active_loras"),
    *("valid_modes", "invalid_modes"),
)


def install(vllm_config: Any) -> None:
    """Wrap the runner that this configuration uses, once a process.

    Raises:
        ValueError: vLLM's functions are not those that we know, or full graphs would be used
            for more than decode steps.
    """
    mode = vllm_config.compilation_config.cudagraph_mode
    if mode is not None and mode.mixed_mode() == CUDAGraphMode.FULL:
        raise ValueError(
            f"sentencekv does not support cudagraph_mode {mode.name}, whose full graphs serve "
            "batches of any kind: set FULL_AND_PIECEWISE, FULL_DECODE_ONLY or PIECEWISE"
        )
    if vllm_config.use_v2_model_runner:
        from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager as Manager
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        wrap(GPUModelRunner, "gather_batch_req_state", V2_PARAMETERS, gather_batch_req_state)
        wrap(Manager, "capture", step_graphs.CAPTURE_PARAMETERS, step_graphs.capture)
        wrap(Manager, "run_fullgraph", step_graphs.RUN_PARAMETERS, step_graphs.run_fullgraph)
    else:
        from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

        wrap(CudagraphDispatcher, "dispatch", V1_PARAMETERS, dispatch)


def wrap(
    owner: type, name: str, parameters: tuple[str, ...], replacement: Callable[..., Any]
) -> None:
    """Replace `owner.name` by `replacement(original, ...)` where its parameters are these.

    Raises:
        ValueError: it is missing, or has other parameters.
    """
    original: Any = getattr(owner, name, None)
    found = tuple(inspect.signature(original).parameters) if original is not None else None
    if found != parameters:
        raise ValueError(
            f"sentencekv expects vLLM's {owner.__name__}.{name}({', '.join(parameters)}) and found "
            f"{found}: install the vLLM version that sentencekv_vllm is tested with"
        )
    if getattr(original, "is_sentencekv", False):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    wrapped.is_sentencekv = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def gather_batch_req_state(
    original: Callable[..., Any], runner: Any, scheduler_output: Any, dummy_run: bool
) -> tuple[Any, int | None]:
    """The V2 runner's first look at a batch: the message is performed here, so that the choice
    of a graph and the builder of metadata know of the sparse rows."""
    state, uniform_tokens = original(runner, scheduler_output, dummy_run)
    runtime = None if dummy_run else current_runtime()
    if runtime is None:
        return state, uniform_tokens
    runtime.apply(scheduler_output.kv_connector_metadata.message)
    if runtime.acts_in_layers and uniform_tokens is not None:
        requests = len(scheduler_output.num_scheduled_tokens)
        if not step_graphs.may_replay(runner.cudagraph_manager, runtime, requests):
            uniform_tokens = None
    return state, uniform_tokens


def dispatch(
    original: Callable[..., Any],
    dispatcher: Any,
    num_tokens: int,
    uniform_decode: bool = False,
    has_lora: bool = False,
    num_active_loras: int = 0,
    valid_modes: Any = None,
    invalid_modes: Any = None,
) -> Any:
    """The V1 runner performs the message before it comes here."""
    runtime = current_runtime()
    if runtime is not None and runtime.acts_in_layers:
        invalid_modes = {*(invalid_modes or ()), CUDAGraphMode.FULL}
    return original(
        dispatcher, num_tokens, uniform_decode, has_lora, num_active_loras, valid_modes,
        invalid_modes,
    )  # fmt: skip
