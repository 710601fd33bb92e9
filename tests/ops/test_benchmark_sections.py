# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark's checks and sections run, with made-up times where there is no GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sentencekv_vllm.ops.cuda_layer_ops import CudaOps

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NaN and -inf, as numpy sees them
]


class CountingClock:
    """Calls once and makes up a time."""

    def time(self, fn, restore=lambda: None, replay=True):
        restore()
        fn()
        return sys.modules["gpu_clock"].Timing(1.0, 2.0, 3.0)

    def host(self, call):
        return self.time(call)


class EagerGraph:
    def __init__(self, fn, restore) -> None:
        restore()
        self.replay = fn


@pytest.fixture
def tools(cuda_kernels, monkeypatch):
    """(gpu_checks, gpu_layer, gpu_sections, gpu_step), with a model small enough to interpret."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import gpu_checks
    import gpu_layer
    import gpu_sections
    import gpu_step

    small = gpu_layer.Shape("small", 2, 1, 32)
    monkeypatch.setitem(gpu_layer.SHAPES, "Llama-3.1-8B", small)
    both = {"Triton": gpu_step.TritonOps, "CUDA": CudaOps}
    for module in (gpu_checks, gpu_sections):
        monkeypatch.setattr(module, "implementations", lambda: both)
        monkeypatch.setattr(module, "capture", EagerGraph)
    return gpu_checks, gpu_layer, gpu_sections


def test_the_checks_pass_and_notice_a_missing_copy(tools, monkeypatch) -> None:
    checks, _, _ = tools
    assert checks.failures(context=640) == []

    def copy_nothing(self, geometry, pools, batch, out):
        self.rank(geometry, pools, batch)
        self.resolve_residency(pools, batch, out)

    monkeypatch.setattr(CudaOps, "select_and_swap_in", copy_nothing)
    assert "CUDA: a selected slot does not hold its page's bytes" in checks.failures(context=640)


def test_kernels_and_steps_are_measured_at_the_hit_rates_that_the_rows_name(tools) -> None:
    _, layer, sections = tools
    from gpu_clock import Bandwidth

    bench = sections.Bench(CountingClock(), Bandwidth(1e12, 1e10, 1e10), 512, 1e9, 1e9)
    sizes = [(layer.SHAPES["Llama-3.1-8B"], 640, 1), (layer.Shape("huge", 64, 8, 128), 2**20, 64)]
    rows = list(bench.step(sizes))  # asserts the misses of each
    rows, on_host = rows[:-4], rows[-4:]
    assert [(row.case, row.implementation) for row in on_host] == [
        (f"host, {case}", name) for name in ("Triton", "CUDA") for case in ("launched", "replayed")
    ]
    assert [(row.model, row.case, row.implementation) for row in rows] == [
        ("small", f"hit rate {share}", name)
        for share in sections.HIT_RATES
        for name in ("Triton", "CUDA")
    ]
    floors = [row.floor_us for row in rows]
    assert floors == sorted(floors, reverse=True) and floors[-1] > 0
    measured = {(row.case, row.implementation) for row in bench.kernels(sizes)}
    assert {("swap_in", "CUDA"), ("swap_in", "Triton"), ("sparse_decode", "Triton")} <= measured
    assert ("sparse_decode", "CUDA") not in measured
