# SPDX-License-Identifier: Apache-2.0
"""`sentencekv`: help at once and in one style, errors on standard error, exit statuses."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from sentencekv_vllm import __version__, cli
from sentencekv_vllm.cli.main import WRAPPED

HEAVY = ("torch", "vllm", "transformers", "triton", "spacy", "numpy", "matplotlib")


def test_help_imports_nothing_heavy_and_lists_every_command():
    code = (
        "import sys; from sentencekv_vllm.cli import main; status = main(['--help']); "
        f"print([m for m in {HEAVY} if m in sys.modules], status)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[] 0", done.stderr
    assert all(f"│ {name} " in done.stdout for name in cli.COMMANDS)


def test_the_version_is_the_packages(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"sentencekv {__version__}\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command_has_the_same_form(name, capsys):
    try:
        status = cli.main([name, "--help"])
    except SystemExit as end:  # argparse's way
        status = end.code
    text = capsys.readouterr().out
    assert status in (0, None)
    assert f"Usage: sentencekv {name}" in text and "╭─ " in text
    assert name == "presets" or len(re.findall(r"^│ .{0,3}--\w", text, re.M)) > 2


@pytest.mark.parametrize("name", sorted(WRAPPED))
def test_help_names_every_argument_with_its_default(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    parser = WRAPPED[name][2]()
    parser.print_help()
    text = capsys.readouterr().out
    for action in parser._actions:
        if "--help" in action.option_strings:
            continue
        assert all(word in text for word in action.option_strings)
        words = (action.help or "").split()[:3]
        assert " ".join(words)[1:].rstrip(".") in text, action.help
        if action.default not in (None, [], {}, False):
            assert f"default: {str(action.default).split(',')[0]}" in text or (
                "default: " in action.help or isinstance(action.default, tuple)
            )
    if parser.epilog:
        assert parser.epilog in text


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["evl"], "sentencekv: no command 'evl'. Did you mean 'eval'?"),
        (["--vresion"], "sentencekv: no option: --vresion"),
        (["presets", "a", "b"], "sentencekv presets: got unexpected extra argument"),
        (["presets", "defalt"], "sentencekv presets: unknown preset 'defalt': did you mean"),
        (["calibrate"], "sentencekv calibrate: the following arguments are required: model"),
        (["eval", "--kl", "--policies", "quest"], "sentencekv eval: --kl measures the distance"),
    ],
)
def test_a_wrong_command_line_is_named_on_standard_error(arguments, told, capsys):
    try:
        status = cli.main(arguments)
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith(told)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "words, expected",
    [
        ("sentencekv e", "eval"),
        ("sentencekv eval --bud", "--budgets"),
        ("sentencekv calibrate --ten", "--tensor-parallel-size"),
        ("sentencekv eval --segmenter pun", "punctuation"),
    ],
)
def test_a_shell_completes_commands_options_and_choices(words, expected, capsys, monkeypatch):
    monkeypatch.setenv("_SENTENCEKV_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    with pytest.raises(SystemExit):
        cli.main([])
    assert capsys.readouterr().out.split() == [expected]


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([], "a text is needed, once"),
        (["--text", "a", "--prompt", "b"], "a text is needed, once"),
        (["--prompt", "none.txt"], "--prompt must name a file in UTF-8, got none.txt"),
        (["--text", "a", "--out", "none/page.html"], "--out must lie in a folder that exists"),
        (["--text", "a", "--budget", "100"], "--budget 100 is below num_sink_tokens 32 + "),
        (["--text", "a", "--policy", "quset"], "policy 'quset' is not known: did you mean"),
    ],
)
def test_inspect_says_what_it_needs_before_it_starts_an_engine(arguments, told, capsys):
    assert cli.main(["inspect", "model", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"sentencekv inspect: {told}")
