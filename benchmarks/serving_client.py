# SPDX-License-Identifier: Apache-2.0
"""The load on a server: the client of `vllm bench serve`, latencies and rates as it computes them.

Called is `vllm.benchmarks.serve.benchmark`, with token ids. The command around it is left out:
its dataset for prompts of our own, `custom`, needs pandas, which vLLM's CPU wheel does not bring.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import Sequence
from typing import Any

from serving_engine import Case
from serving_model import Model, Prompt

PERCENTILES = (50.0, 99.0)
SHORT = 4  # tokens


def load(url: str, model: Model, prompts: Sequence[Prompt], case: Case) -> dict[str, Any]:
    """Send the prompts, greedily decoded to the full length, and return the client's result."""
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark

    requests = [
        SampleRequest(
            prompt=prompt.ids, prompt_len=len(prompt.ids), expected_output_len=case.output_tokens
        )
        for prompt in prompts
    ]
    work = benchmark(
        task_type=TaskType.GENERATION,
        endpoint_type="openai",
        api_url=f"{url}/v1/completions",
        base_url=url,
        model_id=model.folder.name,
        model_name=model.folder.name,
        tokenizer=model.tokenizer,
        input_requests=requests,
        logprobs=None,
        request_rate=float("inf"),
        burstiness=1.0,
        disable_tqdm=True,
        num_warmups=0,  # would repeat a prompt, which the prefix cache then knows
        profile=False,
        selected_percentile_metrics=["ttft", "tpot", "itl", "e2el"],
        selected_percentiles=list(PERCENTILES),
        ignore_eos=True,
        goodput_config_dict={},
        max_concurrency=case.concurrency,
        lora_modules=None,
        extra_headers=None,
        extra_body={"temperature": 0, "skip_special_tokens": False},
        ready_check_timeout_sec=0,  # the server is ready
    )
    with contextlib.redirect_stdout(io.StringIO()):  # its report: the table has the same numbers
        result: dict[str, Any] = asyncio.run(work)
    return result


def reply(url: str, model: Model, prompt: Prompt) -> None:
    """One short reply, to warm up or to flush: our metrics travel with the next engine step."""
    result = load(url, model, [prompt], Case(len(prompt.ids), 1, 1, SHORT))
    if result["failed"]:
        raise RuntimeError(f"the server does not answer: {result['errors'][0]}")
