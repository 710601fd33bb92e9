# SPDX-License-Identifier: Apache-2.0
"""Prefill of one long prompt: with all of it in the pool, and with its history on the host.

The embedded model, one thread. Both engines run in turn, each in a process of its own; processor
time of the engine's process is compared, since other load on the machine does not count in it.

    python benchmarks/visits.py [--tokens 16000] [--chunk 2048] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BLOCK = 32


def prefill(tokens: int, chunk: int, visits: bool, rounds: int) -> dict[str, Any]:
    """Processor seconds of each prefill, the first one left out, and the pool's blocks."""
    from vllm import LLM, SamplingParams

    model = Path(str(find_spec("sentencekv_vllm").origin)).parent / "assets/tiny-recall"  # type: ignore[union-attr]
    whole = -(-tokens // BLOCK) + 40
    layers, in_flight, working_set = 4, -(-chunk // BLOCK) + 10, 40
    staging = -(-(tokens // BLOCK) // layers)
    blocks = in_flight + max(staging, working_set) + 8 if visits else whole
    llm = LLM(
        model=str(model),
        attention_backend="sentencekv",
        enforce_eager=True,
        block_size=BLOCK,
        num_gpu_blocks_override=blocks,
        kv_cache_memory_bytes=1 << 30,
        max_model_len=tokens + 64,
        max_num_batched_tokens=chunk,
        max_num_seqs=2,
        enable_prefix_caching=False,
        async_scheduling=False,
        additional_config={"sentencekv": {"host_pool_gib": 0.2, "segmenter": "punctuation"}},
    )
    params = SamplingParams(temperature=0, max_tokens=2, min_tokens=2)
    ids = [5 + 7 * i % 900 for i in range(tokens)]
    seconds = []
    for _ in range(rounds + 1):
        started = time.process_time()
        llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        seconds.append(time.process_time() - started)
    core = llm.llm_engine.engine_core.engine_core
    visitors = core.scheduler.connector.scheduler.ledger.admission.visitors
    assert visitors == (rounds + 1 if visits else 0), visitors
    return {"blocks": blocks, "seconds": seconds[1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=16000)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--visits", choices=("on", "off"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.visits:
        result = prefill(given.tokens, given.chunk, given.visits == "on", given.rounds)
        print(json.dumps(result))
        return
    fixed = {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    medians = {}
    for visits in ("off", "on"):
        command = [sys.executable, "-P", __file__, "--visits", visits]
        command += [f"--{name}={getattr(given, name)}" for name in ("tokens", "chunk", "rounds")]
        run = subprocess.run(
            command, env=os.environ | fixed, capture_output=True, text=True, check=True
        )
        result = json.loads(run.stdout.splitlines()[-1])
        medians[visits] = statistics.median(result["seconds"])
        times = ", ".join(f"{s:.2f}" for s in result["seconds"])
        print(f"visits {visits}: {result['blocks']} blocks, processor seconds {times}")
    print(f"{given.tokens} tokens: {medians['on'] / medians['off']:.3f} times the large pool's")


if __name__ == "__main__":
    main()
