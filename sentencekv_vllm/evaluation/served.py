# SPDX-License-Identifier: Apache-2.0
"""Questions to a served model over the OpenAI API, with what they cost."""

from __future__ import annotations

import math
import statistics
import threading
import time
from dataclasses import dataclass
from typing import Any

from .server import Server

POLL_SECONDS = 0.02
SETTLE_SECONDS = 5.0  # for the metrics of a finished request


@dataclass(frozen=True)
class Reply:
    """One greedy completion and what vLLM's metrics gained by it."""

    text: str  # up to the end-of-text token
    summary: dict[str, Any]  # `RequestState.summary()`; empty from another backend
    seconds_per_token: float  # decode time by the engine's clock, per token after the first
    swapped_in_bytes: float
    swapped_out_bytes: float
    seconds_to_first_token: float = math.nan  # by the engine's clock


class Client:
    """The only user of one server, so that what its metrics gain belongs to the request."""

    def __init__(self, server: Server, end_of_text: str, timeout_s: float = 120) -> None:
        """Connect; `end_of_text` is how the model's end-of-text token is written."""
        from openai import OpenAI

        self.server = server
        self._end_of_text = end_of_text
        self._openai = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=timeout_s)

    def ask(self, prompt: str, num_tokens: int) -> Reply:
        """Decode exactly `num_tokens` tokens, more than one: past the answer, for the clock."""
        before = self.server.metrics()
        reply = self._complete(prompt, num_tokens)
        finished = "vllm:request_decode_time_seconds_count"
        deadline = time.monotonic() + SETTLE_SECONDS
        after = self.server.metrics()
        while after.value(finished) == before.value(finished) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            after = self.server.metrics()

        def gained(name: str) -> float:
            return after.value(name) - before.value(name)

        extra = (reply.model_extra or {}).get("kv_transfer_params") or {}
        return Reply(
            text=reply.choices[0].text.partition(self._end_of_text)[0],
            summary=extra.get("sentencekv", {}),
            seconds_per_token=gained("vllm:request_decode_time_seconds_sum") / (num_tokens - 1),
            swapped_in_bytes=gained("vllm:sentencekv_swap_in_bytes_total"),
            swapped_out_bytes=gained("vllm:sentencekv_swap_out_bytes_total"),
            seconds_to_first_token=gained("vllm:time_to_first_token_seconds_sum"),
        )

    def blocks_held(self, prompt: str, num_tokens: int) -> int:
        """KV blocks in use while `num_tokens` tokens are decoded, by vLLM's usage gauge.

        The median over the later half of the decode: a request holds its whole prompt until it
        turns sparse.
        """
        polls: list[float] = []
        decoding, done = threading.Event(), threading.Event()

        def poll() -> None:
            decoding.wait()
            while not done.wait(POLL_SECONDS):
                polls.append(self.server.metrics().value("vllm:kv_cache_usage_perc"))

        poller = threading.Thread(target=poll)
        poller.start()
        try:
            for _ in self._complete(prompt, num_tokens, stream=True):
                decoding.set()
        finally:
            done.set()
            decoding.set()
            poller.join()
        busy = [share for share in polls if share > 0]
        if not busy:
            raise RuntimeError(
                f"{num_tokens} tokens were decoded between two looks at the metrics: ask for more"
            )
        blocks = int(self.server.metrics().label("vllm:cache_config_info", "num_gpu_blocks"))
        # One block is vLLM's null block.
        return round(statistics.median(busy[len(busy) // 2 :]) * (blocks - 1))

    def _complete(self, prompt: str, num_tokens: int, stream: bool = False) -> Any:
        return self._openai.completions.create(
            model=self.server.model,
            prompt=prompt,
            max_tokens=num_tokens,
            temperature=0,
            stream=stream,
            extra_body={"ignore_eos": True, "skip_special_tokens": False},
        )
