# SPDX-License-Identifier: Apache-2.0
"""One prompt to an engine of the embedded model: `python -P -m ...self_test BACKEND FILE`.

`sentencekv` reads everything through the sparse path, `stock` is vLLM's own backend. The engine is
a process of its own, as a server's is.
"""

from __future__ import annotations

import json
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


def answer(backend: str) -> dict[str, Any]:
    """Tokens of the answer and, from our backend, what its processes say."""
    from vllm import LLM, SamplingParams

    from ..evaluation.recall_tasks import make_prompt

    ours = backend == "sentencekv"
    chosen = {"attention_backend": backend, "additional_config": {"sentencekv": SETTINGS}}
    llm = LLM(**ENGINE, **(chosen if ours else {}))
    tokenizer = llm.get_tokenizer()

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    prompt = make_prompt("niah_single", PROMPT_TOKENS, 0, count).prompt
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    return {
        "api": presence(),
        "prompt_tokens": len(output.prompt_token_ids or ()),
        "tokens": list(output.outputs[0].token_ids),
        "summary": (output.kv_transfer_params or {}).get("sentencekv"),
        "worker": llm.collective_rpc(worker_facts)[0] if ours else None,
    }


if __name__ == "__main__":
    # By its name as a module: what is sent to the worker must be found there.
    from sentencekv_vllm.vllm_glue import self_test

    Path(sys.argv[2]).write_text(json.dumps(self_test.answer(sys.argv[1])))
