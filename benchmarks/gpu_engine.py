# SPDX-License-Identifier: Apache-2.0
"""vLLM on a GPU, with sentencekv and without: right answers first, then speed.

    python -P benchmarks/gpu_engine.py

`answers`: the embedded tiny-recall model answers needle questions under stock attention, under
policy `full` through the sparse path (the same answers are expected) and under a budget.
`speed`: time to the first token and time per output token of a model with the shape of
Llama-3.1-8B and random weights, by context; the first context is shorter than what turns sparse.
`throughput`: more requests than the KV memory of the GPU holds, which is the same for both.
Random weights make timings, but no realistic selection: hit rates and answers of these two parts
mean nothing. Every engine runs in a process of its own; engines start side by side, and are timed
in turns.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sentencekv_vllm.evaluation.recall_tasks import is_correct, make_prompt
from sentencekv_vllm.presets import PACKAGE

TINY_RECALL = PACKAGE / "assets" / "tiny-recall"
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LAYER_TOKEN_BYTES = 8 * 128 * 2 * 2  # K and V of one token in a layer of LLAMA_8B
BLOCK = 32  # tokens: a request has at most 8192 blocks, and 128K tokens are the prompt alone
ANSWERS = {
    "stock": None,
    "full": {"policy": "full", "stay_dense_when_covered": False, "working_set_tokens": 4096},
    "sentencekv": {"token_budget": 512},
}
SPEED = {  # settings beside the sizes
    "stock": None,
    "sentencekv": {},
}


def arguments() -> argparse.Namespace:
    def sizes(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--parts", default="answers,speed,throughput", help="some of them")
    add("--contexts", type=sizes, default=[4096, 8192, 32768, 65536, 131072],
        help="prompt tokens of `speed`; `throughput` takes the last")  # fmt: skip
    add("--requests", type=int, default=1, help="requests at once in `speed`")
    add("--crowd", type=int, default=6, help="requests of `throughput`")
    add("--budget", type=int, default=1024, help="tokens attended to in `speed`")
    add("--output-tokens", type=int, default=128, help="of each request in `speed`")
    add("--items", type=int, default=8, help="questions of `answers`")
    add("--layers", type=int, default=LLAMA_8B["num_hidden_layers"], help="of `speed`'s model")
    add("--crowd-layers", type=int, default=8, help="of `throughput`'s model")
    add("--gpu-memory-utilization", type=float, default=0.1, help="that must be free at the start")
    add("--profile", type=Path, help="folder for a table of kernels of the longest context's steps")
    add("--turns", type=Path, help=argparse.SUPPRESS)  # a lock: who has it is timed
    add("--eager", action="store_true", help="no torch.compile and no graphs")
    add("--json", type=Path, default=Path("results/gpu_engine.json"))
    add("--child", help=argparse.SUPPRESS)  # part:backend, in the engine's own process
    add("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_llm(model: Path, settings: dict[str, Any] | None, eager: bool, **options: Any) -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # tracebacks, and no second process
    from vllm import LLM

    if settings is not None:
        options["attention_backend"] = "sentencekv"
        options["additional_config"] = {"sentencekv": settings}
    return LLM(model=str(model), enforce_eager=eager, **options)


def answers(backend: str, options: argparse.Namespace) -> dict[str, Any]:
    """Answers of one backend to the same questions of 1500 and 3000 tokens."""
    from vllm import SamplingParams

    settings = ANSWERS[backend]
    if settings is not None:
        common = {"min_context_tokens": 512, "num_sink_tokens": 32, "recent_window": 64}
        settings = {**common, "host_pool_gib": 0.5, "segmenter": "punctuation", **settings}
    llm = make_llm(
        TINY_RECALL, settings, options.eager, max_model_len=4096, max_num_seqs=8,
        kv_cache_memory_bytes=1 << 30, gpu_memory_utilization=options.gpu_memory_utilization,
    )  # fmt: skip
    tokenizer = llm.get_tokenizer()

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    items = [
        make_prompt("niah_single", (1500, 3000)[i % 2], i, count) for i in range(options.items)
    ]
    # No stop string: the reply has no summary then.
    parameters = SamplingParams(temperature=0, max_tokens=32, logprobs=0)
    outputs = llm.generate([item.prompt for item in items], parameters, use_tqdm=False)
    told = [(o.kv_transfer_params or {}).get("sentencekv") for o in outputs]
    texts = [o.outputs[0].text.partition("\n")[0] for o in outputs]
    return {
        "texts": texts,
        "correct": [is_correct(text, item) for text, item in zip(texts, items, strict=True)],
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "logprobs": [
            [
                step[token].logprob
                for token, step in zip(o.outputs[0].token_ids, o.outputs[0].logprobs, strict=True)
            ]
            for o in outputs
        ],
        "told": told,
    }


def make_shape(
    backend: str, options: argparse.Namespace, layers: int, requests: int, resident: int
) -> Any:
    """An engine of Llama-3.1-8B's shape.

    Args:
        layers: of the model.
        requests: that the swap pool has room for.
        resident: requests that the GPU has KV memory for.
    """
    longest = max(options.contexts) + options.output_tokens
    request_gib = longest * LAYER_TOKEN_BYTES * layers / 2**30
    settings: dict[str, Any] | None = SPEED[backend]
    if settings is not None:
        settings = {
            "token_budget": options.budget,
            "host_pool_gib": round(1.05 * requests * request_gib, 2),
            "segmenter": "fixed",
            **settings,
        }
    with tempfile.TemporaryDirectory() as folder:
        model = LLAMA_8B | {"num_hidden_layers": layers}
        Path(folder, "config.json").write_text(json.dumps(model))
        return make_llm(
            Path(folder), settings, options.eager, load_format="dummy", skip_tokenizer_init=True,
            max_model_len=longest + 64, max_num_seqs=max(8, requests),
            enable_prefix_caching=False, block_size=BLOCK,
            gpu_memory_utilization=options.gpu_memory_utilization,
            kv_cache_memory_bytes=int((1.05 * resident * request_gib + 0.25) * 2**30),
        )  # fmt: skip


@contextmanager
def turn(options: argparse.Namespace) -> Iterator[None]:
    """Nobody else is timed meanwhile."""
    if options.turns is None:
        yield
        return
    with options.turns.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def speed(backend: str, options: argparse.Namespace) -> dict[str, Any]:
    """TTFT and TPOT at every context length, after requests that warm up."""
    llm = make_shape(backend, options, options.layers, options.requests, options.requests)
    rows = []
    with turn(options):
        for context in options.contexts:
            short = argparse.Namespace(**vars(options) | {"output_tokens": 24})
            if context <= 2 * 8192:  # compiles what prefill and decode need
                timed(llm, context, options.requests, short)
            rows.append(timed(llm, context, options.requests, options))
        if options.profile is not None:
            profile(llm, backend, options)
    return {"rows": rows, "peak_gpu_bytes": torch.cuda.max_memory_allocated()}


def profile(llm: Any, backend: str, options: argparse.Namespace) -> None:
    """Kernels of some decode steps at 32K tokens or the longest context, by time."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=40, ignore_eos=True, detokenize=False)
    ids = [(7 * i) % 100_000 + 1000 for i in range(min(32768, max(options.contexts)))]
    engine = llm.llm_engine
    engine.add_request("profiled", {"prompt_token_ids": ids}, parameters)
    produced = 0
    while produced < 24:
        produced += len(engine.step())
    torch.cuda.synchronize()
    with torch.profiler.profile() as profiler:
        started = time.perf_counter()
        for _ in range(8):
            engine.step()
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - started
    while engine.has_unfinished_requests():
        engine.step()
    averages = profiler.key_averages()
    tables = [
        averages.table(sort_by=f"self_{unit}_time_total", row_limit=45, max_name_column_width=70)
        for unit in ("cuda", "cpu")
    ]
    options.profile.mkdir(parents=True, exist_ok=True)
    text = "\n".join([f"8 steps in {1e3 * elapsed:.2f} ms", *tables])
    (options.profile / f"{backend}.txt").write_text(text)


def throughput(backend: str, options: argparse.Namespace) -> dict[str, Any]:
    """A crowd with the longest context, on GPU KV memory for one of them."""
    llm = make_shape(backend, options, options.crowd_layers, options.crowd, 1)
    # Stock serves them one by one, so two tell as much as all.
    requests = options.crowd if SPEED[backend] is not None else 2
    with turn(options):
        timed(llm, 16384, 1, argparse.Namespace(**vars(options) | {"output_tokens": 24}))
        row = timed(llm, max(options.contexts), requests, options)
    return {"rows": [row]}


def timed(llm: Any, context: int, requests: int, options: argparse.Namespace) -> dict[str, Any]:
    """One batch of requests that arrive together."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    parameters = SamplingParams(
        temperature=0, max_tokens=options.output_tokens, ignore_eos=True, detokenize=False
    )
    generator = torch.Generator().manual_seed(context)
    started = time.perf_counter()
    for i in range(requests):
        ids = torch.randint(1000, 100_000, (context,), generator=generator).tolist()
        engine.add_request(f"{context}-{started}-{i}", {"prompt_token_ids": ids}, parameters)
    started, steps, first, told = time.perf_counter(), [], None, []
    while engine.has_unfinished_requests():
        produced = engine.step()
        now = time.perf_counter()
        if produced:
            first = first or now
            steps.append((now, len(produced)))
        for output in produced:
            if output.finished:
                told.append((output.kv_transfer_params or {}).get("sentencekv"))
    ended = time.perf_counter()
    most = max(count for _, count in steps)
    # Steps of the largest batch that had one before it, but for those that record graphs.
    gaps = sorted(
        (b - a, count)
        for (a, before), (b, count) in zip(steps[16:], steps[17:], strict=False)
        if count == before == most
    )
    return {
        "context": context,
        "requests": requests,
        "at_once": most,
        "ttft_ms": 1e3 * ((first or ended) - started),
        "tpot_ms": {q: 1e3 * gaps[int(q / 100 * len(gaps))][0] for q in (20, 50, 80)},
        "decode_tokens_per_s": most / gaps[len(gaps) // 2][0],
        "seconds": ended - started,
        "told": told,
    }


def apart(engines: list[tuple[str, str]], logs: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Run this script for each engine, all at once; their logs go to files in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        for part, backend in engines:
            name = Path(folder, f"{part}-{backend}")
            command = [sys.executable, "-P", __file__, *sys.argv[1:], "--turns", f"{folder}/turns"]
            command += ["--child", f"{part}:{backend}", "--result", str(name)]
            with (logs / f"{name.name}.log").open("w") as log:
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            running[part, backend] = (name, process)
        results: dict[tuple[str, str], dict[str, Any]] = {}
        for (part, backend), (name, process) in running.items():
            if process.wait() == 0 and name.exists():
                results[part, backend] = json.loads(name.read_text())
            else:
                print((logs / f"{name.name}.log").read_text(), file=sys.stderr)
                error = f"{part} with {backend} ended with status {process.returncode}"
                results[part, backend] = {"error": error}
        return results


def child(options: argparse.Namespace) -> None:
    part, backend = options.child.split(":")
    found = {"answers": answers, "speed": speed, "throughput": throughput}[part](backend, options)
    options.result.write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # the engine's threads have nothing left to do


def show_answers(found: dict[str, dict[str, Any]]) -> None:
    stock = found["stock"]
    for backend, result in found.items():
        if "error" in result or "error" in stock:
            print(f"answers  {backend:10}  {result.get('error', 'stock failed')}")
            continue
        right, total = sum(result["correct"]), len(result["correct"])
        modes = sorted({told["mode"] for told in result["told"] if told})
        same = sum(a == b for a, b in zip(result["tokens"], stock["tokens"], strict=True))
        gap = max(
            abs(x - y)
            for a, b in zip(result["logprobs"], stock["logprobs"], strict=True)
            for x, y in zip(a, b, strict=False)
        )
        print(f"answers  {backend:10}  {right}/{total} right, {same} with stock's tokens, "
              f"logprobs within {gap:.4f}, modes {modes}")  # fmt: skip


def show_times(part: str, found: dict[str, dict[str, Any]]) -> None:
    for backend, result in found.items():
        if "error" in result:
            print(f"{part:10} {backend:10}  {result['error']}")
            continue
        for row in result["rows"]:
            told = [t for t in row["told"] if t]
            modes = {t["mode"] for t in told}
            rates = [t["hit_rate"] for t in told if t.get("hit_rate") is not None]
            rate = f"hit rate {sum(rates) / len(rates):.3f}" if rates else ""
            print(
                f"{part:10} {backend:10} {row['context'] // 1024:4}K x {row['requests']}, "
                f"{row['at_once']} at once  TTFT {row['ttft_ms']:9.1f} ms  TPOT p20, p50, p80 "
                f"{', '.join(f'{t:.2f}' for t in row['tpot_ms'].values())} ms  "
                f"{row['decode_tokens_per_s']:7.1f} tokens/s  {row['seconds']:6.1f} s  "
                f"{' '.join(sorted(modes))} {rate}"
            )


def main() -> int:
    options = arguments()
    if options.child:
        child(options)
    if not torch.cuda.is_available():
        print(
            "benchmarks/gpu_engine.py needs a CUDA device and vLLM's CUDA build, and found no "
            "device: the CPU's engine is measured by benchmarks/accuracy.py and decode_step.py",
            file=sys.stderr,
        )
        return 2
    parts = options.parts.split(",")
    backends = {"answers": ANSWERS, "speed": SPEED, "throughput": SPEED}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    engines = [(part, backend) for part in parts for backend in backends[part]]
    found = apart(engines, options.json.parent)
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for part in parts:
        results[part] = {backend: found[part, backend] for backend in backends[part]}
        if part == "answers":
            show_answers(results[part])
        else:
            show_times(part, results[part])
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if any("error" in result for result in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
