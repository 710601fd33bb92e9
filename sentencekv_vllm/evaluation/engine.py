# SPDX-License-Identifier: Apache-2.0
"""The served path in this process: vLLM with our backend, a policy per request."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

DENSE = "dense"
"""Name of the request that switches sentencekv off: exact attention on the same engine."""


@dataclass(frozen=True)
class Completion:
    """One greedy answer, and whatever follows it up to the limit."""

    text: str
    output_tokens: int
    summary: dict[str, Any]  # `RequestState.summary()`


class Engine(Protocol):
    """What the runner needs of an engine."""

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, without the begin-of-text token."""

    def complete(
        self, prompt: str, policies: Sequence[str], max_tokens: int
    ) -> Sequence[Completion]:
        """Answer the prompt under each policy."""


def request_arguments(policy: str) -> dict[str, str]:
    """`SamplingParams.extra_args` that decode one request under a policy, or densely."""
    return {"sentencekv": "off"} if policy == DENSE else {"sentencekv_policy": policy}


class VllmEngine:
    """`vllm.LLM` in this process, with prefix caching: a prompt is prefilled once."""

    def __init__(
        self,
        model: Path,
        settings: Mapping[str, Any],
        *,
        block_size: int,
        max_prompt_tokens: int,
        max_policies: int,
        kv_cache_bytes: int,
    ) -> None:
        """Start it; takes some ten seconds.

        Args:
            model: folder or name.
            settings: `additional_config["sentencekv"]`.
            block_size: tokens of a KV block.
            max_prompt_tokens: longest prompt.
            max_policies: most policies of one `complete` call.
            kv_cache_bytes: KV memory of the device.
        """
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        self._llm = LLM(
            model=str(model),
            attention_backend="sentencekv",
            additional_config={"sentencekv": dict(settings)},
            enforce_eager=True,
            block_size=block_size,
            kv_cache_memory_bytes=kv_cache_bytes,
            max_model_len=max_prompt_tokens + 512,
            max_num_seqs=max_policies,
            # As many blocks are copied out in a step as these tokens have: with all of them,
            # every request is sparse from its first decode step on.
            max_num_batched_tokens=max_policies * (max_prompt_tokens + 512),
            enable_prefix_caching=True,
            disable_log_stats=True,
        )
        self._tokenizer = self._llm.get_tokenizer()

    def count_tokens(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False).input_ids)

    def complete(
        self, prompt: str, policies: Sequence[str], max_tokens: int
    ) -> Sequence[Completion]:
        from vllm import SamplingParams

        # No stop string: vLLM finds it outside the engine, and the reply has no summary then.
        parameters = [
            SamplingParams(
                temperature=0, max_tokens=max_tokens, extra_args=request_arguments(policy)
            )
            for policy in policies
        ]
        outputs = self._llm.generate([prompt] * len(policies), parameters, use_tqdm=False)
        return [
            Completion(
                text=output.outputs[0].text,
                output_tokens=len(output.outputs[0].token_ids),
                summary=(output.kv_transfer_params or {})["sentencekv"],
            )
            for output in outputs
        ]
