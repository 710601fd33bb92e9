# SPDX-License-Identifier: Apache-2.0
"""`make demo`, shortened to one question."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

pytest.importorskip("openai", reason="the openai client is not installed")


@pytest.mark.slow
def test_the_demo_answers_releases_blocks_and_says_so():
    command = [sys.executable, "-P", "-m", "sentencekv_vllm.demo"]
    command += ["--lengths", "4096", "--depths", "0.5"]
    demo = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert demo.returncode == 0, demo.stdout + demo.stderr
    verdict = demo.stdout.splitlines()[-1]
    assert verdict.startswith("OK: 1 of 1 answers right (stock: 1), at least ")
    held = re.search(r"stock (\d+), sentencekv (\d+)", demo.stdout)
    assert held and 0 < int(held[2]) < int(held[1]) / 5
    assert len(re.findall(r"stock \d+\.\d+ ms, sentencekv \d+\.\d+ ms", demo.stdout)) == 1
