# SPDX-License-Identifier: Apache-2.0
"""Runs a text through the worker's model and keeps the moments of its keys and queries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.tokenizers import cached_tokenizer_from_config

from ..ops.moments import SKIPPED, Moments, counted
from .calibration_text import CalibrationError, Job, Piece, pieces
from .recorder import Recorder, attend_causally

LEAST = 512  # tokens that must count


def prepare(vllm_config: Any, job: Job, block_size: int) -> list[Piece]:
    """The forwards of a text.

    Raises:
        CalibrationError: this model, or this server, cannot run them.
    """
    model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
    if vllm_config.load_config.load_format == "dummy":
        raise CalibrationError("the weights are made up (load_format dummy)")
    if vllm_config.lora_config is not None:
        raise CalibrationError(
            "LoRA adapters are enabled: run `sentencekv calibrate`, which has none"
        )
    if parallel.data_parallel_size > 1 and parallel.is_moe_model is not False:
        raise CalibrationError(
            "the experts of data-parallel engines step together: run `sentencekv calibrate`"
        )
    if model_config.skip_tokenizer_init:
        raise CalibrationError("there is no tokenizer (skip_tokenizer_init)")
    try:
        ids = list(cached_tokenizer_from_config(model_config).encode(job.text))[: job.tokens]
    except Exception as error:  # of any kind, as tokenizers are
        raise CalibrationError(f"the tokenizer failed ({error})") from error
    longest = vllm_config.scheduler_config.max_num_batched_tokens
    runs = pieces(ids, longest, positions_of(model_config)) if ids else []
    count = sum(len(counted(len(piece.ids), block_size)) for piece in runs)
    if count < LEAST:
        raise CalibrationError(
            f"the text has {len(ids)} tokens, which run twice in forwards of at most {longest} "
            f"(max_num_batched_tokens); {count} of them count, in whole blocks of {block_size} "
            f"behind the first {SKIPPED} of a forward, and at least {LEAST} must"
        )
    return runs


def measure(
    vllm_config: Any,
    model: Any,
    runs: Sequence[Piece],
    layer_names: Sequence[str],
    block_size: int,
    device: torch.device,
) -> list[Moments]:
    """Moments of each layer. All tensor-parallel ranks call it together.

    Raises:
        Exception: whatever the model raises.
    """
    recorder = Recorder(block_size)
    others = layers_of_vllm(vllm_config, layer_names)
    with torch.inference_mode(), recorder.active(), without_a_cache(others):
        for piece in runs:
            _forward(vllm_config, model, piece, device)
    missing = [name for name in layer_names if name not in recorder.moments]
    if missing:
        raise ValueError(f"nothing attended in {missing[0]}")
    return [recorder.moments[name] for name in layer_names]


def layers_of_vllm(vllm_config: Any, ours: Sequence[str]) -> list[Any]:
    """Attention layers that are not ours: those with a window."""
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    return [layer for name, layer in layers.items() if name not in ours]


@contextmanager
def without_a_cache(layers: Sequence[Any]) -> Iterator[None]:
    """vLLM's own layers attend in forwards without metadata, in which they would do nothing."""
    for layer in layers:
        layer.impl.forward = _attend  # before the method of its class
    try:
        yield
    finally:
        for layer in layers:
            del layer.impl.forward


def _attend(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    attn_metadata: Any,
    output: Tensor,
    **_: Any,
) -> Tensor:
    impl = layer.impl
    softcap = impl.logits_soft_cap or 0.0
    window = layer.sliding_window
    output.copy_(attend_causally(query, key, value, impl.scale, softcap, window))
    return output


def _forward(vllm_config: Any, model: Any, piece: Piece, device: torch.device) -> Any:
    count = len(piece.ids)
    ids = torch.tensor(piece.ids, dtype=torch.int32, device=device)
    positions = torch.arange(count, device=device) + piece.offset
    if vllm_config.model_config.uses_mrope:
        positions = positions.expand(3, -1).contiguous()
    # Uncompiled: no graph is traced for a size that never comes again.
    with set_forward_context(None, vllm_config, num_tokens=count, skip_compiled=True):
        return model(
            input_ids=ids, positions=positions, intermediate_tensors=None, inputs_embeds=None
        )


def positions_of(model_config: Any) -> int:
    """Positions of the model itself, whatever length it is served at."""
    derived, _ = model_config.model_arch_config.derived_max_model_len_and_key
    return int(derived if derived < float("inf") else model_config.max_model_len)
