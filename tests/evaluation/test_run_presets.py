# SPDX-License-Identifier: Apache-2.0
"""Presets are command lines that `sentencekv eval` takes."""

from __future__ import annotations

import pytest

from sentencekv_vllm.evaluation import engine_setup
from sentencekv_vllm.evaluation.command import questions
from sentencekv_vllm.evaluation.estimate import seconds
from sentencekv_vllm.evaluation.options import parse
from sentencekv_vllm.evaluation.run_presets import PRESETS
from sentencekv_vllm.evaluation.variant import make_variants
from sentencekv_vllm.policies import POLICIES


def asked(*given):
    options = parse(given, "")
    variants = make_variants(options.policies, options.budgets, options.ablation)
    return options, variants, questions(options)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_asks_for_every_policy(name):
    options, variants, _ = asked("--preset", name)
    selective = {name for name, policy in POLICIES.items() if not policy.keeps_all}
    assert {variant.policy for variant in variants} - {None} == selective
    assert str(options.out) == f"results/{name}"


def test_the_headline_rests_on_two_hundred_questions_a_cell_and_128_tokens_of_history():
    options, _, problems = asked("--preset", "headline")
    assert len(problems) == 200 * 4 * 2
    assert engine_setup.history_tokens(options)(*options.budgets) == 128


def test_what_follows_the_preset_wins():
    options, _, problems = asked(
        "--preset", "headline", "--items", "3", "--policies", "dense,quest"
    )
    assert (options.items, options.policies) == (3, ["dense", "quest"])
    assert len(problems) == 3 * 4 * 2


def test_every_budget_of_the_sweep_fits_the_working_set():
    options, _, _ = asked("--preset", "sweep")
    history = [engine_setup.history_tokens(options)(budget) for budget in options.budgets]
    assert history == [64, 128, 256, 512, 1024]
    assert max(history) <= options.working_set


def test_styles_of_a_question_share_its_prefill():
    _, variants, both = asked("--preset", "headline", "--items", "2")
    _, _, one = asked("--preset", "headline", "--items", "2", "--styles", "restated")
    longer, shorter = (seconds(problems, variants, False) for problems in (both, one))
    assert shorter < longer < 2 * shorter
