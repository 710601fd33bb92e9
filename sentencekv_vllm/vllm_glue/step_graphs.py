# SPDX-License-Identifier: Apache-2.0
"""Decode steps whose rows are all sparse, replayed as one CUDA graph of the whole model.

For the V2 runner, whose full graphs are replayed by `ModelCudaGraphManager.run_fullgraph`: vLLM
chooses, pads and fills its buffers as for a graph of its own, and here another one is replayed
on the same buffers, in which the layers rank and attend sparsely. It is recorded when a step of
its kind comes for the second time, not at start-up: which tables it reads depends on how long the
contexts have become (`worker/step_buffers.py`).

Where vLLM keeps them: v1/worker/gpu/cudagraph_utils.py (ModelCudaGraphManager.capture,
run_fullgraph), v1/worker/gpu/model_runner.py (GPUModelRunner.execute_model).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.forward_context import set_forward_context

from ..worker.graphs import CannotRecord
from ..worker.runtime import Runtime
from .metadata import current_runtime

logger = logging.getLogger(__name__)

CAPTURE_PARAMETERS = (
    *("self", "model", "model_state", "input_buffers", "intermediate_tensors", "block_tables"),
    *("attn_groups", "kv_cache_config", "pcp_manager", "has_lora", "use_aux_hidden_state_outputs"),
    *("lora_capture_hook", "progress_bar_desc"),
)
RUN_PARAMETERS = ("self", "desc")


@dataclass(frozen=True)
class Forward:
    """The model and the buffers that every full graph of a manager reads."""

    model: Callable[..., Tensor]
    input_buffers: Any

    def __call__(self, manager: Any, num_tokens: int, attn_metadata: dict[str, Any]) -> None:
        """Run the model on the first tokens of the buffers, into the manager's hidden states."""
        buffers, n = self.input_buffers, num_tokens
        with set_forward_context(
            attn_metadata,
            manager.vllm_config,
            num_tokens=n,
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            slot_mapping={name: part.slot_mapping for name, part in attn_metadata.items()},
            is_padding=buffers.is_padding[:n],
        ):
            hidden_states = self.model(
                input_ids=buffers.input_ids[:n],
                positions=buffers.positions[:n],
                intermediate_tensors=None,
            )
            manager.hidden_states[:n].copy_(hidden_states)


def capture(original: Callable[..., None], manager: Any, *args: Any, **kwargs: Any) -> None:
    """vLLM captures its graphs: keep what they are made of."""
    original(manager, *args, **kwargs)
    arguments = dict(zip(CAPTURE_PARAMETERS[1:], args, strict=False)) | kwargs
    if _is_plain(manager, arguments):
        manager.sentencekv_forward = Forward(arguments["model"], arguments["input_buffers"])


def _is_plain(manager: Any, arguments: dict[str, Any]) -> bool:
    """The model takes token ids and positions from the buffers, and returns hidden states. Other
    models, and ranks whose collectives must be registered with a graph, keep piecewise graphs.
    So do models with windowed layers: their metadata would be recorded with one step's lengths."""
    return (
        manager.hidden_states is not None
        and len(arguments["kv_cache_config"].kv_cache_groups) == 1
        and manager.tp_size == manager.dp_size == 1
        and not arguments.get("has_lora")
        and not arguments.get("use_aux_hidden_state_outputs")
        and not arguments["model_state"].prepare_dummy_inputs(1, 1)
    )


def may_replay(manager: Any, runtime: Runtime, num_requests: int) -> bool:
    """A decode step of `num_requests` requests, all sparse, can be one graph."""
    return hasattr(manager, "sentencekv_forward") and runtime.is_recordable(num_requests)


def run_fullgraph(original: Callable[..., Any], manager: Any, desc: Any) -> Any:
    """The manager's own graph, or that of a step with sparse rows."""
    runtime = current_runtime()
    if runtime is None or not runtime.acts_in_layers:
        return original(manager, desc)
    attn_metadata = get_kv_transfer_group().attn_metadata
    calls = next(iter(attn_metadata.values())).split.sparse  # plans the step; all layers share it
    kind = tuple((call.plan.graphs, call.plan.layers, call.plan.variant) for call in calls)

    def forward() -> None:
        manager.sentencekv_forward(manager, desc.num_tokens, attn_metadata)

    try:
        calls[0].plan.graphs.run((desc, *kind), forward)
    except CannotRecord as error:
        logger.warning(
            "SentenceKV: a decode step could not be recorded as one CUDA graph (%s). It runs "
            "without, and the steps after it between piecewise graphs.",
            error,
        )
        forward()
        del manager.sentencekv_forward
    return manager.hidden_states[: desc.num_tokens]
