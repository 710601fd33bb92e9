# SPDX-License-Identifier: Apache-2.0
"""One prompt to two engines of the embedded model: `python -P -m ...self_test FILE`.

The first reads everything through the sparse path and is a process of its own, as a server's is;
the second has vLLM's own backend, in this process: importing vLLM once more takes as long as it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from ..presets import PACKAGE
from .presence import presence

MODEL = PACKAGE / "assets" / "tiny-recall"
PROMPT_TOKENS, NEW_TOKENS, BLOCK_SIZE = 600, 24, 32
SETTINGS = {
    "policy": "full",
    "stay_dense_when_covered": False,
    "min_context_tokens": 64,
    "working_set_tokens": 1024,
    "host_pool_gib": 0.02,
    "segmenter": "punctuation",
    "index_codes": True,  # made, though nothing is ranked
    "calibration": False,
}
ENGINE = {
    "model": str(MODEL),
    "enforce_eager": True,
    "block_size": BLOCK_SIZE,
    "kv_cache_memory_bytes": 64 << 20,
    "max_model_len": 1024,
    "max_num_seqs": 2,
    "gpu_memory_utilization": 0.1,  # a server may be running beside it
    "disable_log_stats": True,
}


def worker_facts(worker: Any) -> dict[str, Any]:
    """Of the worker's process, asked there."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from .backend import platform

    runner = type(worker.model_runner)
    runtime = get_kv_transfer_group().runtime
    return presence() | {
        "device": str(worker.device),
        "runner": "V2" if ".gpu.model_runner" in f".{_modules(runner)}" else "V1",
        "ops": runtime.ops.name,
        "host_bytes": runtime.pools.host_bytes,
        "index_bytes": runtime.pools.index_bytes,
        "kv_blocks": len(runtime.pools.layers[0].cache),
        "dense": platform.BASE.__name__,
    }


def _modules(runner: type) -> str:
    """Of a runner and its bases; the CPU's runners derive from the GPU's."""
    return " .".join(base.__module__ for base in runner.__mro__)


def ours() -> dict[str, Any]:
    """Answer of our backend, and what the engine's processes say."""
    llm = start(
        multiprocessing=True,
        attention_backend="sentencekv",
        additional_config={"sentencekv": SETTINGS},
    )
    found = answer(llm) | {"api": presence(), "worker": llm.collective_rpc(worker_facts)[0]}
    llm.llm_engine.engine_core.shutdown()
    return found


def stock() -> dict[str, Any]:
    """Answer of vLLM's own backend, or why there is none."""
    try:
        return answer(start(multiprocessing=False))
    except Exception as error:  # of any kind: the report goes on without it
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def start(multiprocessing: bool, **options: Any) -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(multiprocessing))
    from vllm import LLM

    return LLM(**ENGINE, **options)


def answer(llm: Any) -> dict[str, Any]:
    """Tokens, and the summary that our backend alone gives."""
    from vllm import SamplingParams

    from ..evaluation.recall_tasks import make_prompt

    tokenizer = llm.get_tokenizer()

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    prompt = make_prompt("niah_single", PROMPT_TOKENS, 0, count).prompt
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    return {
        "prompt_tokens": len(output.prompt_token_ids or ()),
        "tokens": list(output.outputs[0].token_ids),
        "summary": (output.kv_transfer_params or {}).get("sentencekv"),
    }


def main(file: Path) -> None:
    """Write what is known at once: the second engine may end the process."""
    found = ours()
    file.write_text(json.dumps(found | {"stock": {"error": "its process has ended"}}))
    file.write_text(json.dumps(found | {"stock": stock()}))


if __name__ == "__main__":
    # By its name as a module: what is sent to the worker must be found there.
    from sentencekv_vllm.vllm_glue import self_test

    self_test.main(Path(sys.argv[1]))
