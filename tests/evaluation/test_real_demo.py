# SPDX-License-Identifier: Apache-2.0
"""What the demo with a real model asks and prints, without servers."""

from __future__ import annotations

import pytest

from sentencekv_vllm import demo
from sentencekv_vllm.evaluation.real import demo as real
from sentencekv_vllm.evaluation.real.maker import Turn
from sentencekv_vllm.evaluation.real.side_by_side import Asked, report
from sentencekv_vllm.evaluation.served import Reply


def reply(text: str, first: float = 0.5, **summary) -> Reply:
    return Reply(text, summary, 0.02, 0, 0, seconds_to_first_token=first)


TURN = Turn("\n\nWhich two numbers?", "They are", ("12", "34"), 20)


def test_both_answers_are_shown_with_what_they_took():
    shown = str(Asked(TURN, reply(" 12 and 33", sparse_steps=9), reply(" 12, 34", first=2.25)))
    assert "They are 12 and 33" in shown and "They are 12, 34" in shown
    assert "[50% of what was asked for; first token after 0.50 s, then 50.0 tokens/s, 9" in shown
    assert "[100% of what was asked for; first token after 2.25 s, then 50.0 tokens/s]" in shown


@pytest.mark.parametrize("ours,word", [(20, "OK"), (100, "FAILED")])
def test_the_verdict_is_about_blocks(ours, word):
    cold, warm = (Asked(TURN, reply(" 12", t), reply(" 12 34", t)) for t in (3.0, 0.25))
    lines = report([cold, warm], ours, 100).splitlines()
    assert lines[0].endswith(
        "3.00 s to the first token, 0.25 s from the prefix cache; 50.0 tokens/s"
    )
    assert lines[-1].startswith(f"{word}: 1.00 of 2 answers (stock: 2.00), ")


def test_an_unknown_model_is_refused(capsys):
    assert demo.main(["--model", "gpt-17"]) == 1
    assert "no folder and none of smollm2-135m, qwen-0.5b, gemma3-270m" in capsys.readouterr().err


def test_the_servers_differ_by_the_backend_only():
    ours, stock = (real.arguments(2048, side) for side in (True, False))
    assert ours[: ours.index("--attention-backend")] + ["--enforce-eager"] == stock
    assert '"token_budget": 256' in ours[-2]
