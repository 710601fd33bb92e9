# SPDX-License-Identifier: Apache-2.0
"""`sentencekv eval` from the command line to its files, with an engine that says yes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest

from sentencekv_vllm import cli
from sentencekv_vllm.evaluation import engine_setup, options
from sentencekv_vllm.evaluation.engine import Completion
from sentencekv_vllm.evaluation.real import tasks

SUMMARY = {
    "mode": "sparse", "sparse_steps": 3, "sentences": 20, "hits": 5, "misses": 1, "coverage": 0.5,
}  # fmt: skip


class Oracle:
    """Says yes to everything; `started` counts engines."""

    started = 0

    def __init__(self, *arguments, **settings) -> None:
        type(self).started += 1

    def count_tokens(self, text):
        return len(text.split())

    def complete(self, requests):
        return [Completion(" Yes.", output_tokens=4, summary=SUMMARY) for _ in requests]


@pytest.fixture
def evaluate(monkeypatch, tmp_path):
    monkeypatch.setattr(engine_setup, "VllmEngine", Oracle)
    monkeypatch.setattr(Oracle, "started", 0)
    monkeypatch.setitem(sys.modules, "sentencekv_vllm.evaluation.plots", None)  # they take long
    few = ["--tasks", "niah_single,multi_turn", "--contexts", "200,300", "--items", "2"]
    out = ["--out", str(tmp_path / "run")]
    return lambda *more: cli.main(["eval", *few, *out, *more])


def test_a_run_leaves_results_summary_and_report(evaluate, tmp_path, capsys):
    assert evaluate("--budgets", "128,256", "--policies", "dense,sentencekv,streaming") == 0
    folder = tmp_path / "run"
    lines = (folder / "results.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["model"] == "tiny-recall"
    assert len(lines) == 1 + 2 * 2 * 2 * 2 * 4  # tasks, styles, contexts, items, variants
    rows = list(csv.DictReader((folder / "summary.csv").open()))
    assert len(rows) == (8 + 2 + 2 + 1) * 4  # cells, pools of tasks and of lengths, all
    assert all(int(row["exact_questions"]) for row in rows)
    assert all(float(r["exact_low"]) <= float(r["exact"]) <= float(r["exact_high"]) for r in rows)
    assert "sentencekv @ 128 | 64 | 16 | 0.00 (0.00-0.19)" in capsys.readouterr().out
    assert "sentencekv @ 128" in (folder / "report.html").read_text()


def test_a_finished_run_is_summed_up_without_an_engine(evaluate):
    assert evaluate() == 0
    assert Oracle.started == 1
    assert evaluate() == 0
    assert Oracle.started == 1


def test_a_folder_of_other_settings_is_refused(evaluate, capsys):
    evaluate()
    assert evaluate("--block-size", "16") == 2
    assert "made with block_size 32, this run has 16" in capsys.readouterr().err


def test_benchmark_files_are_asked_too(evaluate, tmp_path):
    path = tmp_path / "niah_single_1" / "validation.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({"input": "Say yes.", "outputs": ["yes"]}) + "\n")
    assert evaluate("--tasks", "none", "--data", f"ruler:{path}", "--policies", "sentencekv") == 0
    cell, pooled = csv.DictReader((tmp_path / "run" / "summary.csv").open())
    assert (cell["task"], cell["exact"]) == ("ruler/niah_single_1", "1.0")
    assert pooled["exact_questions"] == "1"


def test_a_prompt_that_the_engine_has_no_room_for_is_named(evaluate, tmp_path, capsys):
    path = tmp_path / "vt" / "validation.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({"input": "word " * 400, "outputs": ["yes"]}) + "\n")
    assert evaluate("--data", f"ruler:{path}") == 2
    assert "401 prompt tokens, the engine takes 300: set --max" in capsys.readouterr().err


def test_an_absent_benchmark_file_ends_the_run_before_an_engine_starts(evaluate, capsys):
    assert evaluate("--data", "ruler:/absent.jsonl") == 2
    assert "/absent.jsonl does not exist" in capsys.readouterr().err
    assert Oracle.started == 0


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--policies", "sentencekw"], "'sentencekw': did you mean 'sentencekv'?"),
        (["--policies", "quest+query"], "write options as POLICY+OPTION=VALUE"),
        (["--set", "retention"], "'retention' is not NAME=VALUE"),
        (["--kl", "--server", "http://x"], "--kl needs an engine in this process"),
        (["--kl", "--policies", "sentencekv"], "add it to --policies"),
    ],
)
def test_a_wrong_option_says_what_is_right(evaluate, capsys, arguments, message):
    with pytest.raises(SystemExit):
        evaluate(*arguments)
    assert message in capsys.readouterr().err


def test_commands_are_listed_and_unknown_ones_refused(capsys):
    assert cli.main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in cli.COMMANDS)
    assert cli.main(["evil"]) == 2
    assert "no command 'evil'" in capsys.readouterr().err


def test_presets_are_listed_and_found(capsys):
    assert cli.main(["presets"]) == 0
    listed = capsys.readouterr().out.split()
    assert "default" in listed
    assert cli.main(["presets", "default"]) == 0
    assert capsys.readouterr().out.strip().endswith("default.yaml")
    assert cli.main(["presets", "defalt"]) == 2
    assert "did you mean 'default'" in capsys.readouterr().err


def test_help_needs_no_vllm():
    code = (
        "import sys; sys.modules['vllm'] = None; from sentencekv_vllm.cli import main; "
        "main(['eval', '--help'])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--budgets" in done.stdout


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A folder of prose and code; makes another one for another word."""
    monkeypatch.setattr(tasks, "chat_of", lambda model: PlainChat())

    def write(word: str) -> list[str]:
        folder = tmp_path / word
        folder.mkdir()
        sentences = [f"The {word} of row {i} is told in a sentence of its own." for i in range(90)]
        (folder / "a.txt").write_text("\n\n".join(f"{s} {s}" for s in sentences))
        (folder / "a.py").write_text("x = 1\n")
        return ["--text-folder", str(folder), "--code-folder", str(folder)]

    return write


class PlainChat:
    """A model without a template."""

    def open(self, user):
        return f"{user}\nAnswer: "


def test_real_tasks_are_asked_about_the_users_texts(evaluate, book, tmp_path, capsys):
    real = ["--tasks", "real/niah_single", "--policies", "dense", "--seed", "40"]
    texts = book("apple")
    assert evaluate(*real, *texts) == 0
    settings, *records = (tmp_path / "run" / "results.jsonl").read_text().splitlines()
    assert len(json.loads(settings)["real_texts"]) == 12
    assert [json.loads(r)["seed"] for r in records] == [40, 40, 41, 41]  # two lengths
    assert evaluate(*real, *texts, "--items", "3") == 0
    assert evaluate(*real, *book("pear")) == 2
    assert "made with real_texts" in capsys.readouterr().err


def test_the_family_of_real_tasks_is_its_questions():
    asked = options.parse(["--tasks", "real,real/niah_single,niah_single"], "").tasks
    assert asked == [*tasks.QUESTIONS, "niah_single"]


@pytest.mark.parametrize(
    "given,message",
    [
        (["--tasks", "real/prose"], "real/prose needs an engine in this process"),
        (["--tasks", "real/multi_turn_session"], "leave out --server, or it"),
        (["--tasks", "real/niah_single"], "in the chat template of --model: name the folder"),
    ],
)
def test_what_a_server_cannot_be_asked_is_refused(given, message, capsys):
    with pytest.raises(SystemExit):
        options.parse(["--server", "http://localhost:1", *given], "")
    assert message in capsys.readouterr().err
