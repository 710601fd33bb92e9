# SPDX-License-Identifier: Apache-2.0
"""vLLM on a GPU, with sentencekv and without: right answers first, then speed.

    python -P benchmarks/gpu_engine.py

`answers`: the embedded tiny-recall model answers needle questions under stock attention, under
policy `full` through the sparse path (the same answers are expected) and under a budget.
`speed`: time to the first token and time per output token of a model with the shape of
Llama-3.1-8B and random weights. Random weights make timings, but no realistic selection: hit
rates and answers of this part mean nothing. Every engine runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
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
ANSWERS = {
    "stock": None,
    "full": {"policy": "full", "stay_dense_when_covered": False, "working_set_tokens": 4096},
    "sentencekv": {"token_budget": 512},
}


def arguments() -> argparse.Namespace:
    def sizes(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--parts", default="answers,speed", help="answers, speed or both")
    add("--contexts", type=sizes, default=[8192, 32768, 131072], help="prompt tokens of `speed`")
    add("--requests", type=int, default=1, help="requests at once in `speed`")
    add("--budget", type=int, default=1024, help="tokens attended to in `speed`")
    add("--output-tokens", type=int, default=128, help="of each request in `speed`")
    add("--items", type=int, default=8, help="questions of `answers`")
    add("--layers", type=int, default=LLAMA_8B["num_hidden_layers"], help="of `speed`'s model")
    add("--kv-gib", type=float, help="GPU memory for KV in `speed`, the same for both backends")
    add("--gpu-memory-utilization", type=float, default=0.85)
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
    parameters = SamplingParams(temperature=0, max_tokens=32)
    outputs = llm.generate([item.prompt for item in items], parameters, use_tqdm=False)
    told = [(o.kv_transfer_params or {}).get("sentencekv") for o in outputs]
    texts = [o.outputs[0].text.partition("\n")[0] for o in outputs]
    return {
        "texts": texts,
        "correct": [is_correct(text, item) for text, item in zip(texts, items, strict=True)],
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "told": told,
    }


def speed(backend: str, options: argparse.Namespace) -> dict[str, Any]:
    """TTFT and TPOT at every context length, after a request that warms up."""
    settings = None
    longest = max(options.contexts) + options.output_tokens
    model = LLAMA_8B | {"num_hidden_layers": options.layers}
    room: dict[str, Any] = {"gpu_memory_utilization": options.gpu_memory_utilization}
    if options.kv_gib is not None:
        room["kv_cache_memory_bytes"] = int(options.kv_gib * 2**30)
    if backend == "sentencekv":
        pool = 1.1 * options.requests * longest * LAYER_TOKEN_BYTES * options.layers / 2**30
        settings = {
            "token_budget": options.budget,
            "min_context_tokens": 4096,
            "host_pool_gib": round(pool, 2),
            "segmenter": "fixed",
        }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(model))
        llm = make_llm(
            Path(folder), settings, options.eager, load_format="dummy", skip_tokenizer_init=True,
            max_model_len=longest + 64, max_num_seqs=max(8, options.requests),
            enable_prefix_caching=False, **room,
        )  # fmt: skip
    rows = [timed(llm, context, options) for context in [min(options.contexts), *options.contexts]]
    return {"rows": rows[1:], "peak_gpu_bytes": torch.cuda.max_memory_allocated()}


def timed(llm: Any, context: int, options: argparse.Namespace) -> dict[str, Any]:
    """One batch of requests that arrive together."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    parameters = SamplingParams(
        temperature=0, max_tokens=options.output_tokens, ignore_eos=True, detokenize=False
    )
    generator = torch.Generator().manual_seed(context)
    started = time.perf_counter()
    for i in range(options.requests):
        ids = torch.randint(1000, 100_000, (context,), generator=generator).tolist()
        engine.add_request(f"{context}-{started}-{i}", {"prompt_token_ids": ids}, parameters)
    started, steps = time.perf_counter(), []
    first, told = None, None
    while engine.has_unfinished_requests():
        produced = engine.step()
        now = time.perf_counter()
        if len(produced) == options.requests:  # everybody decodes
            first = first or now
            steps.append(now)
        for output in produced:
            if output.finished:
                told = (output.kv_transfer_params or {}).get("sentencekv")
    # The first sparse steps fill the working set; the steady state is what follows.
    gaps = sorted(b - a for a, b in zip(steps[16:], steps[17:], strict=False))
    return {
        "context": context,
        "ttft_ms": 1e3 * ((first or now) - started),
        "tpot_ms": {q: 1e3 * gaps[int(q / 100 * len(gaps))] for q in (20, 50, 80)},
        "told": told,
    }


def apart(part: str, backend: str) -> dict[str, Any]:
    """Run this script for one engine; its log goes to standard error."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, "-P", __file__, *sys.argv[1:]]
        command += ["--child", f"{part}:{backend}", "--result", str(result)]
        done = subprocess.run(command, stdout=sys.stderr)
        if done.returncode or not result.exists():
            return {"error": f"{part} with {backend} ended with status {done.returncode}"}
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def child(options: argparse.Namespace) -> None:
    part, backend = options.child.split(":")
    found = {"answers": answers, "speed": speed}[part](backend, options)
    options.result.write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # the engine's threads have nothing left to do


def show_answers(found: dict[str, dict[str, Any]]) -> None:
    stock = found["stock"]
    for backend, result in found.items():
        if "error" in result:
            print(f"answers  {backend:10}  {result['error']}")
            continue
        right, total = sum(result["correct"]), len(result["correct"])
        modes = sorted({told["mode"] for told in result["told"] if told})
        same = "unknown"
        if "error" not in stock:
            pairs = zip(result["texts"], stock["texts"], strict=True)
            same = str(sum(a == b for a, b in pairs))
        print(f"answers  {backend:10}  {right}/{total} right, {same} as stock, modes {modes}")


def show_speed(found: dict[str, dict[str, Any]]) -> None:
    for backend, result in found.items():
        if "error" in result:
            print(f"speed    {backend:10}  {result['error']}")
            continue
        for row in result["rows"]:
            told = row["told"] or {}
            print(
                f"speed    {backend:10}  {row['context'] // 1024:4}K  "
                f"TTFT {row['ttft_ms']:9.1f} ms  TPOT p50 {row['tpot_ms']['50']:7.2f} ms  "
                f"{told.get('mode', '')} hit rate {told.get('hit_rate', '-')}"
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
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    parts = options.parts.split(",")
    if "answers" in parts:
        results["answers"] = {backend: apart("answers", backend) for backend in ANSWERS}
        show_answers(results["answers"])
    if "speed" in parts:
        results["speed"] = {b: apart("speed", b) for b in ("stock", "sentencekv")}
        show_speed(results["speed"])
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    failed = [r for part in parts for r in results.get(part, {}).values() if "error" in r]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
