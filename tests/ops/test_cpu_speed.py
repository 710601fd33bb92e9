# SPDX-License-Identifier: Apache-2.0
"""A sparse decode step costs a fraction of vLLM's dense one, everything counted."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch

from sentencekv_vllm.types import IndexKind

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "decode_attention.py"
# On AVX2 alone, on a busy machine, 6.0 and 9.5 were measured. What a byte of memory costs differs
# by machine, so these floors tell a mistake, not a slower processor.
FLOORS = {IndexKind.TOKEN_CODES: 3.0, IndexKind.CENTROID: 5.0}
ATTEMPTS = 3  # on a machine with neighbours


@pytest.fixture
def benchmark():
    pytest.importorskip("vllm", reason="the other side is vLLM's attention")
    spec = importlib.util.spec_from_file_location("decode_attention", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    threads = torch.get_num_threads()
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)
    del sys.modules[spec.name]


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's CPU attention is not in this build")
def test_faster_than_dense_attention_at_32k(benchmark) -> None:
    best = dict.fromkeys(FLOORS, 0.0)
    for _ in range(ATTEMPTS):
        results = benchmark.measure(
            context=32768, block_size=32, num_layers=1, drifts=(0.02,), steps=40
        )
        for result in results:
            kind = result.setting.kind
            best[kind] = max(best[kind], result.ratio_of_minima)
        if all(best[kind] >= floor for kind, floor in FLOORS.items()):
            break
    assert all(best[kind] >= floor for kind, floor in FLOORS.items()), (best, FLOORS)
