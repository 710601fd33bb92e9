# SPDX-License-Identifier: Apache-2.0
"""Lines of the table in docs/compatibility.md that no other test holds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from engine import (  # noqa: E402
    MODEL,
    SETTINGS,
    apart,
    generate,
    greedy,
    ledger_of,
    make_items,
    scheduler_of,
)

from sentencekv_vllm.scheduler.reasons import Reason  # noqa: E402

LAYER = {
    "num_heads": 4,
    "head_size": 64,
    "scale": 0.125,
    "num_kv_heads": 2,
    "alibi_slopes": None,
    "sliding_window": None,
    "kv_cache_dtype": "auto",
}


def test_soft_capping_is_refused_on_cuda(monkeypatch):
    from vllm.config import VllmConfig, set_current_vllm_config

    from sentencekv_vllm.vllm_glue.cuda import Impl

    with set_current_vllm_config(VllmConfig()):
        Impl(**LAYER)
        with pytest.raises(ValueError, match=r"soft-capping .here 30\.0.*another attention"):
            Impl(**LAYER, logits_soft_cap=30.0)


def test_caches_that_vllm_zeroes_are_refused():
    from sentencekv_vllm.vllm_glue.worker_side import _refuse_cache

    _refuse_cache(SimpleNamespace(needs_kv_cache_zeroing=False))
    with pytest.raises(ValueError, match="zeroes before use.*another attention backend"):
        _refuse_cache(SimpleNamespace(needs_kv_cache_zeroing=True))


@pytest.mark.parametrize(
    "change",
    [{"prompt_token_ids": None}, {"resumable": True}, {"mm_features": [object()]}],
    ids=lambda change: next(iter(change)),
)
def test_inputs_without_a_fixed_prompt_of_text_stay_dense(change):
    from sentencekv_vllm.vllm_glue.scheduler_side import SchedulerSide

    states = []
    side = SimpleNamespace(
        ledger=SimpleNamespace(add=states.append),
        resolved=SimpleNamespace(config=SimpleNamespace(warm_start=False)),
        _options=lambda request: (Reason.SHORT_CONTEXT, object(), False),
        _segment=lambda state: None,
    )
    request = {"request_id": "a", "prompt_token_ids": [1, 2], "resumable": False}
    request |= {"mm_features": [], "sampling_params": None}
    SchedulerSide.add(side, SimpleNamespace(**request, all_token_ids=[1, 2]))
    SchedulerSide.add(side, SimpleNamespace(**(request | change), all_token_ids=[1, 2]))
    plain, special = states
    assert plain.options is not None
    assert special.options is None and special.reason is Reason.UNSUPPORTED_INPUT


def default_blocks():
    from vllm import LLM

    llm = LLM(
        MODEL,
        attention_backend="sentencekv",
        additional_config={"sentencekv": SETTINGS},
        enforce_eager=True,
        num_gpu_blocks_override=200,
        kv_cache_memory_bytes=1 << 28,
        max_model_len=4096,
        max_num_seqs=2,
    )
    (manager,) = scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers
    (record,) = generate(llm, [make_items(llm, [1500])[0].prompt], greedy(4))
    return {
        "config": llm.llm_engine.vllm_config.cache_config.block_size,
        "manager": manager.block_size,
        "ledger": ledger_of(llm).limits.block_size,
        "released": record["told"]["blocks_released"],
    }


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the default of a CPU")
def test_without_a_block_size_an_engine_on_a_cpu_has_blocks_of_32():
    """Not the configuration's number alone: vLLM 0.33 settles its own after ours."""
    found = apart(default_blocks, timeout_s=500)
    assert found["config"] == found["manager"] == found["ledger"] == 32
    assert found["released"] > 0
