# SPDX-License-Identifier: Apache-2.0
"""Engines for the integration tests, each in a process of its own.

vLLM keeps one connector and one parallel state per process, so an engine that follows another
in the same process does not start fresh. `apart(function, ...)` runs a function of a test
module in a new process and returns what it returned. The process is forked from one that has
imported vLLM and done nothing else: an import takes as long as most of the tests.
"""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

MODEL = str(Path(importlib.util.find_spec("sentencekv_vllm").origin).parent / "assets/tiny-recall")
BLOCK = 32
SETTINGS = {  # small enough that prompts of a thousand tokens are sparse
    "token_budget": 256,
    "num_sink_tokens": 32,
    "recent_window": 64,
    "working_set_tokens": 320,
    "min_context_tokens": 256,
    "host_pool_gib": 0.1,
    "segmenter": "punctuation",
}


def apart(
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = 280,
    fresh: bool = False,
    **kwargs: Any,
) -> Any:
    """Run `function(*args, **kwargs)` in a new process; everything is pickled.

    Args:
        timeout_s: then it is killed.
        fresh: a process that has imported nothing, for functions that say how Triton is imported.

    Raises:
        AssertionError: it raised, died or took too long; the message ends with its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, result, log = (Path(folder, name) for name in ("given", "result", "log"))
        given.write_bytes(pickle.dumps((args, kwargs)))
        place = (inspect.getfile(function), function.__name__)
        context = multiprocessing.get_context("spawn") if fresh else _forks()
        process = context.Process(target=_run, args=(*place, given, result, log, environment()))
        process.start()
        try:
            process.join(timeout_s)
            late = f"\nkilled after {timeout_s} s" if process.exitcode is None else ""
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its engine cores, too
            process.kill()  # if it has not come as far as to lead a group
            process.join()
        output = log.read_text()[-6000:] if log.exists() else ""
        assert result.exists(), f"{function.__name__}, apart:\n{output}{late}"
        return pickle.loads(result.read_bytes())


@cache
def _forks() -> Any:
    """Makes processes that have imported vLLM."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker"])
    # It keeps the environment that it starts in. Safe path: the folder triton_kernels would take
    # the name of Triton's package.
    with mock.patch.dict(os.environ, environment() | {"PYTHONSAFEPATH": "1"}, clear=True):
        forkserver.ensure_running()
    return context


def _run(
    module_path: str,
    name: str,
    given: Path,
    result: Path,
    log: Path,
    environment: dict[str, str],
) -> None:
    """In the new process: a function of a module, by name."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # of the environment before
    try:
        spec = importlib.util.spec_from_file_location(Path(module_path).stem, module_path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        args, kwargs = pickle.loads(given.read_bytes())
        result.write_bytes(pickle.dumps(getattr(module, name)(*args, **kwargs)))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the engine's threads have nothing left to do


def environment() -> dict[str, str]:
    """One thread and no split of the KV range: equal work gives equal bits."""
    fixed = {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_ATTN_SPLIT_KV": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # Triton's interpreter, which kernel tests switch on, is not meant for an engine.
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | fixed


# In the process of the engine ---------------------------------------------------------------


def make_llm(
    settings: dict[str, Any] | None,
    multiprocess: bool = False,
    blocks: int = 1600,
    fits: bool = True,
    **engine: Any,
) -> Any:
    """The embedded model behind `LLM`.

    Args:
        settings: replaces some of `SETTINGS`; None is vLLM's own CPU backend.
        multiprocess: the engine core in a process of its own, vLLM's default.
        blocks: of the KV pool, the null block included.
        fits: lower max_model_len to what the pool holds.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(multiprocess))
    from vllm import LLM

    options: dict[str, Any] = {
        "model": MODEL,
        "enforce_eager": True,
        "block_size": BLOCK,
        "num_gpu_blocks_override": blocks,
        "kv_cache_memory_bytes": 1 << 30,
        "max_model_len": 17408,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 2048,
        "async_scheduling": False,
        **engine,
    }
    if fits:
        held = (blocks - 1) * options["block_size"]
        options["max_model_len"] = min(options["max_model_len"], held)
    if settings is not None:
        options["attention_backend"] = "sentencekv"
        options["additional_config"] = {"sentencekv": SETTINGS | settings}
    return LLM(**options)


def make_items(llm: Any, lengths: Sequence[int], seed: int = 0, **options: Any) -> list[Any]:
    """One single-needle prompt of at most `length` tokens for each length."""
    from sentencekv_vllm.evaluation.recall_tasks import make_prompt

    tokenizer = llm.get_tokenizer()

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    task = options.pop("task", "niah_single")
    return [
        make_prompt(task, length - 1, seed + i, count, **options)
        for i, length in enumerate(lengths)
    ]


def greedy(max_tokens: int = 32, **options: Any) -> Any:
    """Sampling parameters: greedy, the top five log-probabilities, the answer's line."""
    from vllm import SamplingParams

    options = {"stop": ["\n"], "logprobs": 5, **options}
    return SamplingParams(temperature=0, max_tokens=max_tokens, **options)


def generate(llm: Any, prompts: Sequence[Any], params: Any = None) -> list[dict[str, Any]]:
    """Outputs as plain records that compare with `==`, logprobs bit for bit."""
    outputs = llm.generate(list(prompts), params or greedy(), use_tqdm=False)
    return [record(output) for output in outputs]


def record(output: Any) -> dict[str, Any]:
    """What one request returned. `told` is its summary, None from the stock backend."""
    told = (output.kv_transfer_params or {}).get("sentencekv")
    return {
        "prompt_tokens": len(output.prompt_token_ids),
        "cached": output.num_cached_tokens,
        "told": told,
        "generated": [
            {
                "text": o.text,
                "tokens": list(o.token_ids),
                "finish": o.finish_reason,
                "logprobs": [
                    {token: float(p.logprob).hex() for token, p in step.items()}
                    for step in o.logprobs or ()
                ],
            }
            for o in output.outputs
        ],
    }


def core(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core


def scheduler_of(llm: Any) -> Any:
    return core(llm).scheduler


def ledger_of(llm: Any) -> Any:
    return scheduler_of(llm).connector.scheduler.ledger


def runtime_of(llm: Any) -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().runtime


def leaks(llm: Any) -> dict[str, int]:
    """What an idle engine still holds, counted on the scheduler side; all zero is clean."""
    from sentencekv_vllm.vllm_glue.groups import our_manager

    scheduler, ledger = scheduler_of(llm), ledger_of(llm)
    pool = scheduler.kv_cache_manager.block_pool
    manager = our_manager(scheduler.kv_cache_manager)
    return {
        "blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        "requests": len(scheduler.requests),
        "host pages": ledger.pages.num_used,
        "slots": ledger.slots.num_used,
        "tracked": len(ledger.states) + len(ledger.slots.owners),
        "private blocks": len(manager._private),
        "visitors": len(ledger._visiting.admitted) + len(ledger.admission.line),
    }


def is_clean(llm: Any) -> bool:
    return not any(leaks(llm).values())
