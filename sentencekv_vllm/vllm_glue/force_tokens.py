# SPDX-License-Identifier: Apache-2.0
"""Teacher forcing: a request's output is given, its distributions are the model's."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

OPTION = "force_tokens"
"""Of `SamplingParams.extra_args`: the token ids to decode first, one per step; what follows is
free. vLLM's logprobs are taken before logits processors, so they tell what the model would have
said."""


class ForceTokens(AdapterLogitsProcessor):
    """For `LLM(logits_processors=[...])`; requests without the option are left alone."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        tokens = (sampling_params.extra_args or {}).get(OPTION)
        if tokens is None:
            return
        if not isinstance(tokens, list) or not all(type(t) is int and t >= 0 for t in tokens):
            raise ValueError(f"{OPTION} is a list of token ids, got {tokens!r}")
        if len(tokens) > sampling_params.max_tokens:
            raise ValueError(
                f"{OPTION} has {len(tokens)} tokens, max_tokens is {sampling_params.max_tokens}: "
                f"set it to at least {len(tokens)}"
            )

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        tokens = (params.extra_args or {}).get(OPTION)
        if tokens is None:
            return None

        def force(output_ids: list[int], logits: Tensor) -> Tensor:
            if len(output_ids) < len(tokens):
                logits.fill_(-math.inf)
                logits[tokens[len(output_ids)]] = 0
            return logits

        return force
