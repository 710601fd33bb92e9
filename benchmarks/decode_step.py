# SPDX-License-Identifier: Apache-2.0
"""Whole engine steps on the CPU: stock attention against sentencekv, in one run.

A random-weight Llama of four layers (8 query and 2 KV heads of 128) decodes one request at
each context length with one thread. Reported per backend: time to the first token and the
median decode step. The engines run one after the other, in processes of their own, and the
whole round is repeated; the ratio is that of the best rounds, because a busy machine only
ever adds time.

    python -P benchmarks/decode_step.py --contexts 4096,8192,32768
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
}
BACKENDS = ("stock", "sentencekv")


def measure(
    backend: str, contexts: list[int], steps: int, settings: dict[str, Any], hidden_size: int
) -> dict:
    """TTFT and decode steps of one engine, in this process; {context: {ttft, step}} in seconds."""
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        width = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size}
        Path(folder, "config.json").write_text(json.dumps(MODEL | width))
        options: dict[str, Any] = {}
        if backend == "sentencekv":
            options["attention_backend"] = "sentencekv"
            options["additional_config"] = {"sentencekv": settings}
        llm = LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            block_size=32,
            max_model_len=max(contexts) + steps + 32,
            max_num_batched_tokens=2048,
            max_num_seqs=2,
            kv_cache_memory_bytes=2 * 4096 * (max(contexts) + 4096),
            enable_prefix_caching=False,
            disable_log_stats=True,
            **options,
        )
    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=steps + 1, ignore_eos=True, detokenize=False)
    found = {}
    for context in contexts:
        prompt = [(7 * i * i + 13 * i) % 1000 + 10 for i in range(context)]
        started = time.perf_counter()
        engine.add_request(f"r{context}", {"prompt_token_ids": prompt}, params)
        while not any(out.outputs[0].token_ids for out in engine.step()):
            pass
        first_token = time.perf_counter()
        times, outputs = [], []
        while engine.has_unfinished_requests():
            before = time.perf_counter()
            outputs += engine.step()
            times.append(time.perf_counter() - before)
        told = next(out.kv_transfer_params for out in outputs if out.finished) or {}
        # The first steps fill the working set and warm the caches.
        found[context] = {
            "sparse_steps": told.get("sentencekv", {}).get("sparse_steps", 0),
            "ttft": first_token - started,
            "first_step": times[0],
            "step": statistics.median(times[len(times) // 4 :]),
        }
    return found


def run(backend: str, arguments: argparse.Namespace) -> dict[int, dict[str, float]]:
    """`measure` in a process of its own."""
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    command = [sys.executable, "-P", __file__, "--measure", backend]
    command += ["--contexts", arguments.contexts, "--steps", str(arguments.steps)]
    command += ["--settings", arguments.settings, "--hidden-size", str(arguments.hidden_size)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"the {backend} engine failed:\n{result.stderr[-4000:]}")
    line = next(x for x in reversed(result.stdout.splitlines()) if x.startswith("RESULT "))
    return {int(k): v for k, v in json.loads(line.removeprefix("RESULT ")).items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--contexts", default="4096,8192,32768")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=512, help="width of the model")
    parser.add_argument(
        "--settings", default='{"host_pool_gib": 1.0, "segmenter": "fixed"}', help="as JSON"
    )
    parser.add_argument("--json", type=Path, help="write the numbers here, too")
    parser.add_argument("--measure", choices=BACKENDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    contexts = [int(c) for c in arguments.contexts.split(",")]
    if arguments.measure:
        settings = json.loads(arguments.settings)
        width = arguments.hidden_size
        found = measure(arguments.measure, contexts, arguments.steps, settings, width)
        print("RESULT " + json.dumps(found))
        return
    best: dict[str, dict[int, dict[str, float]]] = {b: {} for b in BACKENDS}
    for _ in range(arguments.rounds):
        for backend in BACKENDS:
            for context, times in run(backend, arguments).items():
                old = best[backend].get(context, times)
                best[backend][context] = {k: min(v, old[k]) for k, v in times.items()}
                sparse = backend == "sentencekv" and context >= 8192
                assert bool(times["sparse_steps"]) == sparse, f"{backend} at {context}: {times}"
    print(f"{'context':>8} {'stock step':>11} {'ours':>9} {'faster':>7}"
          f" {'stock TTFT':>11} {'ours':>9} {'ratio':>6} {'1st step':>9}")  # fmt: skip
    for context in contexts:
        stock, ours = (best[b][context] for b in BACKENDS)
        print(
            f"{context:8d} {1e3 * stock['step']:8.2f} ms {1e3 * ours['step']:6.2f} ms"
            f" {stock['step'] / ours['step']:6.2f}x {stock['ttft']:9.2f} s {ours['ttft']:7.2f} s"
            f" {ours['ttft'] / stock['ttft']:6.3f} {1e3 * ours['first_step']:6.2f} ms"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(best, indent=1) + "\n")


if __name__ == "__main__":
    main()
