# SPDX-License-Identifier: Apache-2.0
"""One side under one load, as a flat record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serving_engine import Case
from serving_model import Model, Prompt
from serving_watch import Watch, peak

MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One side under one load. None: not known for this side or mode.

    Times are in milliseconds and, like the rates, those of vLLM's client. TTFT counts from when
    a request was sent, so it includes the wait for KV blocks. Memory is that of all processes
    of the engine, without files; on CUDA `gpu_mib` is that of all GPUs, weights included.
    """

    mode: str
    side: str
    model: str
    context: int
    output_tokens: int
    concurrency: int
    requests: int
    kv_pool_tokens: int
    completed: int
    failed: int
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_p50: float | None
    ttft_p99: float | None
    tpot_p50: float | None
    tpot_p99: float | None
    itl_p50: float | None
    itl_p99: float | None
    e2el_p50: float | None
    e2el_p99: float | None
    running_peak: float
    running_mean: float
    kv_usage_peak: float
    preemptions: float
    process_mib: float
    gpu_mib: float | None
    right_answers: int | None
    prefix_hit_tokens: float
    hit_rate: float | None
    swapped_in_mib: float | None
    swapped_out_mib: float | None
    released_blocks: float | None
    sparse_requests: float | None
    dense_requests: float | None


def make_row(
    mode: str,
    side: str,
    model: Model,
    case: Case,
    prompts: Sequence[Prompt],
    result: dict[str, Any],
    watch: Watch,
) -> Row:
    """Join what the client measured with what was seen of the engine."""
    ours = side == "sentencekv"
    gained = watch.gained
    label = watch.after.label
    hits, misses = (gained(f"vllm:sentencekv_{name}_total") for name in ("hits", "misses"))
    requests = "vllm:sentencekv_requests_total"
    sparse = watch.after.value(requests, reason="sparse")
    sparse -= watch.before.value(requests, reason="sparse")
    gpu = [look.gpu_bytes for look in watch.looks if look.gpu_bytes is not None]
    running = [look.levels["vllm:num_requests_running"] for look in watch.looks]
    blocks = int(label("vllm:cache_config_info", "num_gpu_blocks")) - 1  # without the null block
    return Row(
        mode=mode,
        side=side,
        model=model.name,
        context=case.context,
        output_tokens=case.output_tokens,
        concurrency=case.concurrency,
        requests=case.requests,
        kv_pool_tokens=blocks * int(label("vllm:cache_config_info", "block_size")),
        completed=result["completed"],
        failed=result["failed"],
        duration_s=result["duration"],
        requests_per_s=result["request_throughput"],
        output_tokens_per_s=result["output_throughput"],
        total_tokens_per_s=result["total_token_throughput"],
        ttft_p50=result.get("p50_ttft_ms"),
        ttft_p99=result.get("p99_ttft_ms"),
        tpot_p50=result.get("p50_tpot_ms"),
        tpot_p99=result.get("p99_tpot_ms"),
        itl_p50=result.get("p50_itl_ms"),
        itl_p99=result.get("p99_itl_ms"),
        e2el_p50=result.get("p50_e2el_ms"),
        e2el_p99=result.get("p99_e2el_ms"),
        running_peak=peak(watch.looks, "vllm:num_requests_running"),
        running_mean=sum(running) / max(1, len(running)),
        kv_usage_peak=peak(watch.looks, "vllm:kv_cache_usage_perc"),
        preemptions=gained("vllm:num_preemptions_total"),
        process_mib=max((look.process_bytes for look in watch.looks), default=0) / MIB,
        gpu_mib=max(gpu) / MIB if gpu else None,
        right_answers=right_answers(prompts, result["generated_texts"]),
        prefix_hit_tokens=gained("vllm:prefix_cache_hits_total"),
        hit_rate=hits / (hits + misses) if hits + misses else None,
        swapped_in_mib=gained("vllm:sentencekv_swap_in_bytes_total") / MIB if ours else None,
        swapped_out_mib=gained("vllm:sentencekv_swap_out_bytes_total") / MIB if ours else None,
        released_blocks=gained("vllm:sentencekv_released_blocks_total") if ours else None,
        sparse_requests=sparse if ours else None,
        dense_requests=result["completed"] - sparse if ours else None,
    )


def right_answers(prompts: Sequence[Prompt], texts: Sequence[str]) -> int | None:
    """How many replies are the expected ones; None where nothing was asked."""
    if not prompts or prompts[0].question is None:
        return None
    return sum(prompt.is_answered_by(text) for prompt, text in zip(prompts, texts, strict=True))
