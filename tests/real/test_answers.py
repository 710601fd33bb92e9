# SPDX-License-Identifier: Apache-2.0
"""What a real, pretrained model answers with our backend, relative to its own dense answers.

SmolLM2-135M finds a number in a thousand tokens of prose, mostly. The bars are relative to what it
does densely, and low: they are about the served path, not about which ranking is best.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from sentencekv_vllm.evaluation.real.tasks import Sources, real_problems

ROOT = Path(__file__).resolve().parents[2]
TASK, TOKENS, ITEMS = "real/niah_single", 1024, 5
BUDGET = TOKENS // 2
KEPT = 0.5  # of what dense attention answers, at least, with half of the context


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    """The prose of this project's documents."""
    if not (ROOT / "docs").is_dir():
        pytest.skip("no docs folder beside the tests: the questions are about its text")
    return str(ROOT / "docs")


@pytest.fixture(scope="module")
def answers(smollm2, texts, tmp_path_factory) -> dict[str, dict[int, dict]]:
    """Records of the question by variant and seed, from `sentencekv eval`."""
    out = tmp_path_factory.mktemp("eval")
    command = [sys.executable, "-P", "-m", "sentencekv_vllm.cli", "eval"]
    command += ["--model", str(smollm2), "--dtype", "float32", "--tasks", TASK]
    command += ["--text-folder", texts, "--code-folder", str(ROOT / "sentencekv_vllm")]
    command += ["--contexts", str(TOKENS), "--items", str(ITEMS), "--policies"]
    command += ["dense,full,sentencekv", "--budgets", str(BUDGET), "--recent", "64"]
    command += ["--requests", "3", "--out", str(out)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    found = defaultdict(dict)
    for line in (out / "results.jsonl").read_text().splitlines()[1:]:
        record = json.loads(line)
        found[record["variant"]][record["seed"]] = record
    return found


def total(records: dict[int, dict]) -> float:
    return sum(record["score"] for record in records.values())


def test_the_prompts_hold_their_needle_once(smollm2, texts):
    problems = real_problems(Sources(str(smollm2), texts), [TASK], [TOKENS], ITEMS)
    items = [problem.make(lambda text: len(text) // 4) for problem in problems[0]]
    assert [item.prompt.count(item.references[0]) for item in items] == [1] * ITEMS
    assert all(item.prompt.count("special magic numbers for") == 1 for item in items)


def test_dense_attention_solves_what_the_others_are_measured_by(answers):
    assert len(answers["dense"]) == ITEMS
    assert total(answers["dense"]) >= ITEMS / 2


def test_full_answers_word_for_word_what_dense_attention_answers(answers):
    for seed, record in answers["dense"].items():
        full = answers["full"][seed]
        assert (full["text"], full["output_tokens"]) == (record["text"], record["output_tokens"])


def test_the_default_policy_keeps_answers_with_half_of_the_context(answers):
    solved = {seed: r for seed, r in answers["dense"].items() if r["score"] == 1}
    kept = {seed: answers["sentencekv"][seed] for seed in solved}
    assert all(r["mode"] == "sparse" and r["sparse_steps"] > 0 for r in kept.values())
    assert total(kept) >= KEPT * total(solved)
