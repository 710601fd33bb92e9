# SPDX-License-Identifier: Apache-2.0
"""The GPU engine benchmark says what it needs where there is no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_engine.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path) -> None:
    command = [sys.executable, "-P", SCRIPT, "--json", tmp_path / "result.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "needs a CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())
