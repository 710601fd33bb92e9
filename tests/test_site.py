# SPDX-License-Identifier: Apache-2.0
"""The documents as a site: complete, without dead links, and about commands that there are."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from sentencekv_vllm import __version__, cli
from sentencekv_vllm.cli.main import WRAPPED, app

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
CALL = re.compile(rf"(?:^|[\s`(/$])sentencekv ((?:{'|'.join(cli.COMMANDS)})\b[^`\n|)#]*)")


def pages_of(entry) -> list[str]:
    """Of a part of the navigation."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in pages_of(part)]


def test_every_page_is_in_the_navigation_once():
    listed = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(path.name for path in DOCS.glob("*.md"))


def test_the_site_builds_and_no_link_leads_nowhere(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: make site")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "command" / "index.html").exists()


def test_the_changelog_has_this_version_and_what_comes():
    heads = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heads[0] == "Unreleased" and __version__ in heads


def documented() -> list[tuple[str, str]]:
    """Page and command line of every `sentencekv ...` that a page names."""
    return [
        (page.name, found.strip().rstrip("\"'.,:; "))
        for page in PAGES
        for found in CALL.findall(page.read_text())
    ]


def options_of(name: str) -> set[str]:
    if name in WRAPPED:
        return {o for action in WRAPPED[name][2]()._actions for o in action.option_strings}
    command = get_command(app).commands[name]
    return {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}


def test_pages_name_options_that_there_are():
    calls = documented()
    assert len(calls) > 15
    assert {line.split()[0] for _, line in calls} == set(cli.COMMANDS)
    known = {name: options_of(name) for name in cli.COMMANDS}
    for page, line in calls:
        words = shlex.split(line.split(" > ")[0].split(" 2>")[0], posix=False)
        given = {word.split("=")[0] for word in words if word.startswith("--")}
        if words[:2] != ["eval", "get-model"]:
            assert given <= known[words[0]], (page, line)
