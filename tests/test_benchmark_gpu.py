# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark says what it needs, and its sections run, here without a GPU's speed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / "gpu.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path) -> None:
    done = run("--csv", str(tmp_path / "gpu.csv"))
    assert done.returncode == 2 and "needs a CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--sections", "kernels,speed"), "'speed' is none of kernels, gather, attention, step"),
        (("--models", "GPT-2"), "'GPT-2' is none of Llama-3.1-8B, Qwen3-32B"),
        (("--contexts", "8K"), "invalid integers value: '8K'"),
        (("--budget", "128"), "give 256 or more"),
    ],
)
def test_a_wrong_argument_is_named(arguments, complaint) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and complaint in done.stderr


class CountingClock:
    """Calls once and makes up a time."""

    def time(self, fn, restore=lambda: None, replay=True):
        from gpu_clock import Timing

        restore()
        fn()
        return Timing(1.0, 2.0, 3.0)


class EagerGraph:
    def __init__(self, fn, restore) -> None:
        restore()
        self.replay = fn
