# SPDX-License-Identifier: Apache-2.0
"""What one request may ask of the memory, checked where it arrives.

A request that could not be served to its end would wait in vLLM's queue for ever, and those
behind it with it: after a preemption it is prefilled with its answer.
"""

from __future__ import annotations

from typing import Any

from vllm.exceptions import VLLMValidationError

from ..request_options import RequestOptions, RequestOptionsError
from ..resolved import ResolvedConfig
from .setup import resolved_config
from .visit_room import Capacity


def limit_request(vllm_config: Any, request: Any) -> None:
    """Refuse a prompt that the memory cannot hold, and end an answer where it is full, as vLLM
    does at max_model_len.

    Args:
        request: vLLM's request for the engine core, with parameters of its own.

    Raises:
        VLLMValidationError: with the tokens that can be served; status 400.
    """
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    if not cache.num_gpu_blocks:
        return
    params = request.sampling_params
    resolved = resolved_config(vllm_config)
    engines = max(1, parallel.data_parallel_size)
    usable = cache.num_gpu_blocks // engines - 1  # one is vLLM's null block
    capacity = Capacity.of(vllm_config, resolved, usable)
    visits = _may_visit(request, resolved)
    most = capacity.longest if visits else capacity.resident
    prompt = _prompt_tokens(request)
    least = 1 if params is None else max(1, params.min_tokens)
    # vLLM prefills at most what was sampled before the last token.
    if prompt + least - 1 > most:
        raise VLLMValidationError(
            f"the prompt has {prompt} tokens and needs "
            f"{-(-prompt // cache.block_size)} KV blocks of {cache.block_size}, the pool has "
            f"{usable}{_host(capacity, resolved, visits)}: send at most {most - least + 1} tokens, "
            "or start the server with more KV memory (--gpu-memory-utilization, "
            "--kv-cache-memory-bytes, host_pool_gib)",
            parameter="prompt",
            value=prompt,
        )
    if params is not None and params.max_tokens is not None:
        params.max_tokens = min(params.max_tokens, most - prompt + 1)


def _host(capacity: Capacity, resolved: ResolvedConfig, visits: bool) -> str:
    if not capacity.visiting:
        return ""
    if visits:
        return (
            f" and the swap pool {resolved.num_pages} pages, which serve {capacity.visiting} tokens"
        )
    return ", and the history of such a request cannot leave the GPU before it is prefilled"


def _prompt_tokens(request: Any) -> int:
    if request.prompt_token_ids is not None:
        return len(request.prompt_token_ids)
    return 0 if request.prompt_embeds is None else len(request.prompt_embeds)


def _may_visit(request: Any, resolved: ResolvedConfig) -> bool:
    """Input and policy let its history leave; `SchedulerSide.add` and `Visiting` decide alike."""
    if request.prompt_token_ids is None or request.mm_features or request.resumable:
        return False
    params = request.sampling_params
    try:
        wanted = RequestOptions.parse(params.extra_args if params else None, resolved)
    except RequestOptionsError:
        return False
    policy = wanted.policy
    return wanted.enabled and policy.settlement is None and not policy.keeps_all
