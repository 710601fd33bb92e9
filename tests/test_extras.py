# SPDX-License-Identifier: Apache-2.0
"""Every extra names requirements that exist and can be installed together."""

from __future__ import annotations

import os
import subprocess
import tomllib
import venv
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
NETWORK = "SENTENCEKV_TEST_NETWORK"


def test_the_pins_of_the_cpu_build_are_what_is_installed_here():
    for text in EXTRAS["cpu"]:
        requirement = Requirement(text)
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            continue  # a machine of another kind
        assert requirement.specifier.contains(installed, prereleases=True), (text, installed)


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_an_extra_names_each_package_once(extra):
    names = [Requirement(text).name.lower().replace("_", "-") for text in EXTRAS[extra]]
    assert len(names) == len(set(names))


@pytest.mark.slow
@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_an_extra_resolves_in_an_empty_environment(extra, tmp_path):
    if os.environ.get(NETWORK) != "1":
        pytest.skip(f"asks a package index for minutes: set {NETWORK}=1 where there is one")
    venv.create(tmp_path / "empty", with_pip=True)
    pip = [str(tmp_path / "empty" / "bin" / "python"), "-m", "pip", "install", "--dry-run"]
    done = subprocess.run(
        [*pip, "--quiet", f"{ROOT}[{extra}]"],
        cwd=tmp_path, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_network_job_of_the_continuous_integration_switches_it_on():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert f'{NETWORK}: "1"' in text and Path(__file__).name in text
