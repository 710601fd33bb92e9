# SPDX-License-Identifier: Apache-2.0
"""A batch through `LLM.generate`, in a process of its own for every engine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from serving_engine import SIDES, Case, Setup, engine_options
from serving_model import Model
from serving_row import Row, make_row
from serving_watch import Watch

from sentencekv_vllm.evaluation.server import ENVIRONMENT, ServerError


def measure(model: str, setup: Setup, case: Case, side: str, log: Path) -> Row:
    """Start an engine, run the batch, stop the engine.

    Raises:
        ServerError: the engine failed; the message ends with the tail of its log.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "given"), Path(folder, "result")
        given.write_text(json.dumps([model, asdict(setup), asdict(case), side]))
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, __file__, given, result],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | ENVIRONMENT,
                start_new_session=True,
            )
            try:
                process.wait()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if not result.exists():
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
            raise ServerError(f"the offline engine ({side}) failed. The end of its log:\n{tail}")
        return Row(**json.loads(result.read_text()))


def run(name: str, setup: Setup, case: Case, side: str, scratch: Path) -> Row:
    """The same in this process."""
    from prometheus_client import generate_latest
    from vllm import LLM, SamplingParams

    model = Model(name, scratch)
    options: dict[str, Any] = engine_options(model, setup, [case], side)
    llm = LLM(model=str(model.folder), disable_log_stats=False, **options)

    def generate(prompts: list[list[int]], tokens: int) -> Any:
        parameters = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, skip_special_tokens=False
        )
        inputs: Any = [{"prompt_token_ids": ids} for ids in prompts]
        return llm.generate(inputs, parameters, use_tqdm=False)

    prompts = [model.prompt(case.context, seed) for seed in range(case.requests + 1)]
    generate([prompts.pop().ids], 4)
    with Watch(lambda: generate_latest().decode(), os.getpid()) as watch:
        started = time.perf_counter()
        outputs = generate([prompt.ids for prompt in prompts], case.output_tokens)
        seconds = time.perf_counter() - started
    texts = [output.outputs[0].text for output in outputs]
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    total = generated + sum(len(prompt.ids) for prompt in prompts)
    result = {
        "completed": len(outputs),
        "failed": case.requests - len(outputs),
        "duration": seconds,
        "request_throughput": len(outputs) / seconds,
        "output_throughput": generated / seconds,
        "total_token_throughput": total / seconds,
        "generated_texts": texts,
    }
    return make_row("offline", side, model, case, prompts, result, watch)


if __name__ == "__main__":
    given, result = map(Path, sys.argv[1:])
    model_name, setup_fields, case_fields, backend = json.loads(given.read_text())
    assert backend in SIDES
    with tempfile.TemporaryDirectory() as folder:
        row = run(model_name, Setup(**setup_fields), Case(**case_fields), backend, Path(folder))
    result.write_text(json.dumps(asdict(row)))
    sys.stdout.flush()
    os._exit(0)  # the engine's threads have nothing left to do
