# SPDX-License-Identifier: Apache-2.0
"""The served path in this process: vLLM with our backend, options per request."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .divergence import Distributions

if TYPE_CHECKING:
    from ..worker.runtime import Runtime

FORCE = "sentencekv_vllm.vllm_glue.force_tokens"


@dataclass(frozen=True)
class Request:
    """One greedy completion to ask for."""

    prompt: str
    max_tokens: int  # decoded freely
    options: Mapping[str, Any] = field(default_factory=dict)  # `Variant.options`
    forced: str = ""
    """Decoded first, whatever the model would say."""
    measured: str = ""
    """Forced, too, after `forced`; its distributions are told. Then nothing is decoded freely."""


@dataclass(frozen=True)
class Completion:
    """One greedy answer, and whatever follows it up to the limit."""

    text: str  # decoded freely
    output_tokens: int  # all
    summary: dict[str, Any]  # `RequestState.summary()`
    cached_tokens: int = 0  # of the prompt, from the prefix cache
    forced: Distributions | None = None
    """Of `Request.measured`."""
    prompt_ids: tuple[int, ...] = ()  # tokens, where the engine tells
    output_ids: tuple[int, ...] = ()


class Engine(Protocol):
    """What the runner needs of an engine."""

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, without the begin-of-text token."""

    def complete(self, requests: Sequence[Request]) -> Sequence[Completion]:
        """Answer all, in their order."""


class VllmEngine:
    """`vllm.LLM` in this process, with prefix caching: a prompt is prefilled once."""

    def __init__(
        self,
        model: str,
        settings: Mapping[str, Any],
        *,
        block_size: int,
        max_prompt_tokens: int,
        max_requests: int,
        kv_cache_bytes: int,
        max_output_tokens: int = 512,
        dtype: str = "auto",
    ) -> None:
        """Start it; takes some ten seconds.

        Args:
            model: folder or name.
            settings: `additional_config["sentencekv"]`.
            block_size: tokens of a KV block.
            max_prompt_tokens: longest prompt.
            max_requests: most requests at a time.
            kv_cache_bytes: KV memory of the device.
            max_output_tokens: longest reply, second turns included.
            dtype: of weights and KV.
        """
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        longest = max_prompt_tokens + max_output_tokens
        self._llm = LLM(
            model=model,
            attention_backend="sentencekv",
            additional_config={"sentencekv": dict(settings)},
            dtype=dtype,
            enforce_eager=True,
            block_size=block_size,
            kv_cache_memory_bytes=kv_cache_bytes,
            max_model_len=longest,
            max_num_seqs=max_requests,
            # As many blocks are copied out in a step as these tokens have: with all of them,
            # every request is sparse from its first decode step on.
            max_num_batched_tokens=max_requests * longest,
            enable_prefix_caching=True,
            disable_log_stats=True,
            logits_processors=[f"{FORCE}:ForceTokens"],
            max_logprobs=-1,
        )
        self._tokenizer = self._llm.get_tokenizer()
        self._end = self._tokenizer.eos_token_id
        self._vocabulary = self._llm.llm_engine.vllm_config.model_config.get_vocab_size()

    @property
    def runtime(self) -> Runtime:
        """Of the worker, which is in this process, too."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        found: Runtime = get_kv_transfer_group().runtime
        return found

    @property
    def tokenizer(self) -> Any:
        """As vLLM wraps it."""
        return self._tokenizer

    def count_tokens(self, text: str) -> int:
        return len(self._tokens(text))

    def complete(self, requests: Sequence[Request]) -> Sequence[Completion]:
        prompts = [request.prompt for request in requests]
        parameters = [self._parameters(request) for request in requests]
        outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        return [self._completion(*pair) for pair in zip(requests, outputs, strict=True)]

    def _completion(self, request: Request, output: Any) -> Completion:
        reply = output.outputs[0]
        text, measured = reply.text, None
        first = len(self._tokens(request.forced)) if request.forced else 0
        if request.measured:
            measured = Distributions(
                np.array(reply.token_ids[first:]), self._table(reply.logprobs[first:])
            )
        elif request.forced:
            free = takewhile(lambda token: token != self._end, reply.token_ids[first:])
            text = self._tokenizer.decode(list(free), skip_special_tokens=True)
        return Completion(
            text=text,
            output_tokens=len(reply.token_ids),
            summary=(output.kv_transfer_params or {})["sentencekv"],
            cached_tokens=output.num_cached_tokens or 0,
            forced=measured,
            prompt_ids=tuple(output.prompt_token_ids or ()),
            output_ids=tuple(reply.token_ids),
        )

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _parameters(self, request: Request) -> Any:
        from vllm import SamplingParams

        forced = [t for part in (request.forced, request.measured) for t in self._tokens(part)]
        options = {**request.options, **({"force_tokens": forced} if forced else {})}
        if request.measured:
            return SamplingParams(
                temperature=0,
                max_tokens=len(forced),
                ignore_eos=True,
                logprobs=-1,
                detokenize=False,  # of thousands of candidates a step
                extra_args=options,
            )
        # No stop string: vLLM finds it outside the engine, and the reply has no summary then.
        return SamplingParams(
            temperature=0,
            max_tokens=len(forced) + request.max_tokens,
            ignore_eos=self._end in forced,  # a chat goes on behind the end of its first reply
            extra_args=options,
        )

    def _table(self, positions: Sequence[Mapping[int, Any]]) -> NDArray[np.float32]:
        table = np.full((len(positions), self._vocabulary), -np.inf, np.float32)
        for row, found in zip(table, positions, strict=True):
            row[list(found)] = [entry.logprob for entry in found.values()]
        return table
