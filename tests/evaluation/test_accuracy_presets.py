# SPDX-License-Identifier: Apache-2.0
"""Presets of benchmarks/accuracy.py are command lines that `sentencekv eval` takes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from sentencekv_vllm.evaluation import engine_setup
from sentencekv_vllm.evaluation.estimate import seconds
from sentencekv_vllm.evaluation.items import interleave, make_cells, recall_problems
from sentencekv_vllm.evaluation.options import parse
from sentencekv_vllm.evaluation.variant import make_variants
from sentencekv_vllm.policies import POLICIES

PATH = Path(__file__).parents[2] / "benchmarks" / "accuracy.py"


@pytest.fixture(scope="module")
def accuracy():
    spec = importlib.util.spec_from_file_location("accuracy", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def asked(accuracy, *given):
    options = parse(accuracy.arguments([*given]), "")
    variants = make_variants(options.policies, options.budgets, options.ablation)
    cells = make_cells(options.tasks, options.styles, options.contexts)
    return options, variants, list(interleave(recall_problems(cells, options.items)))


@pytest.mark.parametrize("name", ["headline", "sweep", "multi-turn", "ranking"])
def test_a_preset_asks_for_every_policy(accuracy, name):
    options, variants, _ = asked(accuracy, "--preset", name)
    selective = {name for name, policy in POLICIES.items() if not policy.keeps_all}
    assert {variant.policy for variant in variants} - {None} == selective
    assert str(options.out) == f"results/{name}"


def test_the_headline_rests_on_two_hundred_questions_a_cell_and_128_tokens_of_history(accuracy):
    options, _, problems = asked(accuracy)
    assert len(problems) == 200 * 4 * 2
    assert engine_setup.history_tokens(options)(*options.budgets) == 128


def test_what_follows_the_preset_wins(accuracy):
    options, _, problems = asked(accuracy, "--items", "3", "--policies", "dense,quest")
    assert (options.items, options.policies) == (3, ["dense", "quest"])
    assert len(problems) == 3 * 4 * 2


def test_every_budget_of_the_sweep_fits_the_working_set(accuracy):
    options, _, _ = asked(accuracy, "--preset", "sweep")
    history = [engine_setup.history_tokens(options)(budget) for budget in options.budgets]
    assert history == [64, 128, 256, 512, 1024]
    assert max(history) <= options.working_set


def test_styles_of_a_question_share_its_prefill(accuracy):
    _, variants, both = asked(accuracy, "--items", "2")
    _, _, one = asked(accuracy, "--items", "2", "--styles", "restated")
    longer, shorter = (seconds(problems, variants, False) for problems in (both, one))
    assert shorter < longer < 2 * shorter
