# SPDX-License-Identifier: Apache-2.0
"""The demo's text: what is right, what was released, and the verdict."""

from __future__ import annotations

import json

import pytest
import yaml

from sentencekv_vllm.demo import COMMON, LENGTHS, MODEL, OURS, PRESET, flags, main
from sentencekv_vllm.evaluation.comparison import HEADER, Question, Round, report, row, succeeded
from sentencekv_vllm.evaluation.recall_tasks import make_prompt
from sentencekv_vllm.evaluation.served import Reply
from sentencekv_vllm.presets import preset_path

ITEM = make_prompt("niah_single", 200, seed=0)


def reply(text: str = ITEM.target, milliseconds: float = 4.0) -> Reply:
    summary = {"hit_rate": 0.75, "coverage": 0.5}
    return Reply(text, summary, milliseconds / 1e3, 3 * 2**20, 16 * 2**20)


def rounds(*answers: str, blocks_ours: int = 10) -> list[Round]:
    questions = [Question(8000, 0.5, ITEM, reply(a, 2.0), reply()) for a in answers]
    return [Round(questions, blocks_ours, blocks_stock=250)]


def test_a_row_shows_the_answer_and_both_times():
    text = row(Question(8000, 0.25, ITEM, reply(milliseconds=2.5), reply(milliseconds=5.0)))
    assert text.split()[:2] == ["8000", "25"]
    assert ITEM.target.strip() in text
    assert text.split()[-7:] == ["right", "0.75", "3.0", "16.0", "50", "5.00", "2.50"]


@pytest.mark.parametrize("answer", [ITEM.target, "x" * 200, ""])
def test_rows_and_header_align(answer):
    text = row(Question(8000, 0.25, ITEM, reply(answer), reply()))
    assert {len(line) for line in HEADER.splitlines()} == {len(text)}


def test_the_verdict_counts_answers_and_released_blocks():
    last = report(rounds(ITEM.target, ITEM.target)).splitlines()[-1]
    assert last.startswith("OK: 2 of 2 answers right (stock: 2), at least 96%")


def test_one_wrong_answer_fails():
    some = rounds(ITEM.target, "No.")
    assert not succeeded(some)
    assert report(some).splitlines()[-1].startswith("FAILED: 1 of 2 answers right (stock: 2)")


def test_right_answers_without_released_blocks_fail():
    assert not succeeded(rounds(ITEM.target, blocks_ours=252))


def test_nothing_asked_is_no_success():
    assert not succeeded([])


def test_times_are_compared_as_stock_over_ours():
    assert "stock 4.00 ms, sentencekv 2.00 ms (2.00x as fast)" in report(rounds(ITEM.target))


def test_flags_are_those_of_the_command_line():
    assert flags({"enforce-eager": True, "block-size": 32}) == [
        "--enforce-eager",
        "--block-size",
        "32",
    ]


def test_a_prompt_beyond_the_servers_length_is_refused_before_they_start(capsys):
    with pytest.raises(SystemExit):
        main(["--lengths", str(max(LENGTHS) + 1)])
    assert f"at most {max(LENGTHS)} tokens" in capsys.readouterr().err


def test_the_demo_fits_the_model_and_its_preset_selects_sentencekv():
    model = json.loads((MODEL / "config.json").read_text())
    assert COMMON["max-model-len"] <= model["max_position_embeddings"]
    preset = yaml.safe_load(preset_path(PRESET).read_text())
    assert preset["attention-backend"] == "sentencekv"
    assert set(OURS) <= set(preset)
