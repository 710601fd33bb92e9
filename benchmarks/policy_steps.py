# SPDX-License-Identifier: Apache-2.0
"""Decode steps of every policy on one CPU engine, against dense attention in the same run.

One request at a time decodes a long prompt that the prefix cache already has: a random-weight
Llama of four layers (8 query and 2 KV heads of 128), one thread. The rounds go through all
policies in turn and the median over all steps counts, so a busy machine slows all of them alike.
Stages are our ops' own clocks.

    python benchmarks/policy_steps.py --context 32768 --budget 1024
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from decode_step import MODEL

STAGES = ("score", "select", "resolve", "swap", "attend")


def start_engine(context: int, budget: int, steps: int) -> Any:
    """An engine with room for every policy's requests."""
    from vllm import LLM

    with tempfile.TemporaryDirectory() as folder:
        width = {"hidden_size": 512, "intermediate_size": 1024}
        Path(folder, "config.json").write_text(json.dumps(MODEL | width))
        settings = {
            "token_budget": budget,
            "host_pool_gib": 1.0,
            "segmenter": "fixed",
            "index_vectors": 2,
            "observation_window": 32,
        }
        return LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            block_size=32,
            max_model_len=context + steps + 64,
            max_num_batched_tokens=context + 64,  # the whole index is built before the first step
            max_num_seqs=2,
            kv_cache_memory_bytes=3 * 4096 * (context + 4096),
            disable_log_stats=True,
            attention_backend="sentencekv",
            additional_config={"sentencekv": settings},
        )


def decode(llm: Any, name: str, prompt: list[int], params: Any) -> tuple[list[float], dict]:
    """Seconds of each decode step, and what the request was told."""
    engine = llm.llm_engine
    engine.add_request(name, {"prompt_token_ids": prompt}, params)
    while not any(out.outputs[0].token_ids for out in engine.step()):
        pass
    seconds, outputs = [], []
    while engine.has_unfinished_requests():
        before = time.perf_counter()
        outputs += engine.step()
        seconds.append(time.perf_counter() - before)
    told = next(out.kv_transfer_params for out in outputs if out.finished) or {}
    return seconds[len(seconds) // 4 :], told["sentencekv"]  # the first ones fill the working set


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": "1",
    }
    from vllm import SamplingParams
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from sentencekv_vllm.policies import POLICIES

    llm = start_engine(arguments.context, arguments.budget, arguments.steps)
    prompt = [(7 * i * i + 13 * i) % 1000 + 10 for i in range(arguments.context)]
    runtime = get_kv_transfer_group().runtime
    take = runtime.take_counters  # of every step, on the way to the metrics
    names = ["dense", *(name for name, policy in POLICIES.items() if not policy.keeps_all)]
    seconds: dict[str, list[float]] = defaultdict(list)
    stages: dict[str, Counter[str]] = defaultdict(Counter)
    told: dict[str, dict] = {}
    for number in range(arguments.rounds):
        for name in names:
            chosen = {"sentencekv": "off"} if name == "dense" else {"sentencekv_policy": name}
            params = SamplingParams(
                temperature=0,
                max_tokens=arguments.steps + 1,
                ignore_eos=True,
                detokenize=False,
                extra_args=chosen,
            )
            runtime.take_counters = lambda name=name: stages[name].update(take()) or {}
            times, told[name] = decode(llm, f"{name} {number}", prompt, params)
            seconds[name] += times
            stages[name].update(take())
            sparse = told[name]["sparse_steps"] >= arguments.steps - 1
            assert sparse != (name == "dense"), f"{name}: {told[name]}"
    dense = statistics.median(seconds["dense"])
    print(f"| policy | step, ms | faster than dense | hit rate | {', '.join(STAGES)}, ms a step |")
    print("|---|---|---|---|---|")
    for name in names:
        step, counted = statistics.median(seconds[name]), stages[name]
        steps = max(1, counted["sparse_steps"])
        split = ", ".join(f"{counted[f'{s}_ns'] / steps / 1e6:.2f}" for s in STAGES)
        hits = f"{told[name]['hit_rate']:.2f}" if told[name]["misses"] else "-"
        print(
            f"| `{name}` | {1e3 * step:.2f} | {dense / step:.2f}x | {hits} |"
            f" {split if name != 'dense' else '-'} |"
        )


if __name__ == "__main__":
    main()
