# SPDX-License-Identifier: Apache-2.0
"""The Triton ops decode in an engine as the C++ ops do; here in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from engine import apart, generate, greedy, is_clean, make_items, make_llm

# Not importorskip: Triton reads TRITON_INTERPRET when it is imported, which vLLM does.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter"),
]


def decode(ops):
    os.environ |= {"TRITON_INTERPRET": "1", "SENTENCEKV_TEST_OPS": ops}
    settings = {"token_budget": 192, "recent_window": 64, "host_pool_gib": 0.03}
    llm = make_llm(settings, max_model_len=1024, max_num_seqs=2, blocks=100)
    prompts = [item.prompt for item in make_items(llm, (600, 560))]
    outputs = generate(llm, prompts, greedy(5, stop=None, ignore_eos=True))
    return outputs, is_clean(llm)


def test_an_engine_on_triton_ops_answers_and_selects_as_on_cpp_ops():
    triton, clean = apart(decode, "triton", timeout_s=500, fresh=True)
    cpp, _ = apart(decode, "cpu")
    assert clean and all(o["told"]["mode"] == "sparse" for o in triton)
    assert [o["generated"] for o in triton] == [o["generated"] for o in cpp]
    for mine, expected in zip(triton, cpp, strict=True):
        for name in ("sparse_steps", "hits", "misses", "blocks_released"):
            assert mine["told"][name] == expected["told"][name]
        assert mine["told"]["coverage"] == pytest.approx(expected["told"]["coverage"], abs=1e-3)
