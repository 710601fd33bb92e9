# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 270M, whose windowed layers are vLLM's: with our backend it says what it says without.

The model is not fetched for this: `sentencekv eval get-model gemma3-270m` makes it, in minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sentencekv_vllm.evaluation.real.models import models_folder

ROOT = Path(__file__).resolve().parents[2]
TASK, TOKENS, ITEMS, BUDGET = "real/niah_single", 2048, 3, 512


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, dict[int, dict]]:
    """Records of the question by variant and seed, from `sentencekv eval`."""
    model = models_folder() / "gemma3-270m"
    if not (model / "config.json").is_file():
        pytest.skip("Gemma 3 270M is not cached: run `sentencekv eval get-model gemma3-270m`")
    if not (ROOT / "docs").is_dir():
        pytest.skip("no docs folder beside the tests: the questions are about its text")
    out = tmp_path_factory.mktemp("eval")
    command = [sys.executable, "-P", "-m", "sentencekv_vllm.cli", "eval"]
    command += ["--model", str(model), "--dtype", "float32", "--tasks", TASK]
    command += ["--text-folder", str(ROOT / "docs"), "--code-folder", str(ROOT / "sentencekv_vllm")]
    command += ["--contexts", str(TOKENS), "--items", str(ITEMS), "--policies"]
    command += ["dense,full,sentencekv", "--budgets", str(BUDGET), "--recent", "64"]
    command += ["--requests", "1", "--out", str(out)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    found: dict[str, dict[int, dict]] = {}
    for line in (out / "results.jsonl").read_text().splitlines()[1:]:
        record = json.loads(line)
        found.setdefault(record["variant"], {})[record["seed"]] = record
    return found


def test_full_answers_word_for_word_what_dense_attention_answers(answers):
    assert len(answers["dense"]) == ITEMS
    for seed, record in answers["dense"].items():
        full = answers["full"][seed]
        assert (full["text"], full["output_tokens"]) == (record["text"], record["output_tokens"])


def test_the_default_policy_answers_what_dense_attention_answers(answers):
    """With a quarter of what the full layers hold; it may miss one."""
    solved = [seed for seed, record in answers["dense"].items() if record["score"] == 1]
    kept = [answers["sentencekv"][seed] for seed in solved]
    assert all(record["mode"] == "sparse" for record in answers["sentencekv"].values())
    assert sum(record["score"] for record in kept) >= len(solved) - 1
