# SPDX-License-Identifier: Apache-2.0
"""The list of what is served, the refusals and the page say the same."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from sentencekv_vllm.vllm_glue.support import ENTRIES, REFUSED, Kind
from sentencekv_vllm.vllm_glue.support.page import filled

ROOT = Path(__file__).resolve().parents[1]
GLUE = ROOT / "sentencekv_vllm/vllm_glue"
PAGE = ROOT / "docs/compatibility.md"


def test_the_page_has_the_table_of_the_list():
    page = PAGE.read_text()
    assert filled(page) == page, (
        "run `python -P -m sentencekv_vllm.vllm_glue.support.page docs/compatibility.md`"
    )
    for entry in ENTRIES:
        assert f"| {entry.what}" in page


def test_a_page_without_a_place_for_the_table_is_an_error():
    with pytest.raises(ValueError, match="needs the lines"):
        filled("# Compatibility\n")


def checked_at_start() -> set[str]:
    """Keys that `setup` looks for, read from its source: no vLLM is needed."""
    tree = ast.parse((GLUE / "setup.py").read_text())
    functions = {f.name: f for f in tree.body if isinstance(f, ast.FunctionDef)}
    keys = set()
    for name in ("conflicts", "_conflicts_of_model", "_conflicts_of_windows"):
        for node in ast.walk(functions[name]):
            if isinstance(node, ast.Dict):
                keys |= {key.value for key in node.keys}
    return keys


def test_every_refusal_at_start_is_in_the_list_and_the_other_way_round():
    listed = {key for key, entry in REFUSED.items() if entry.kind is Kind.AT_START}
    elsewhere = {"some layers", "version"}  # `refuse_partial_selection`, `_refuse_version`
    assert checked_at_start() == listed - elsewhere
    source = (GLUE / "setup.py").read_text()
    assert 'REFUSED["some layers"]' in source and "_refuse_version(" in source


def test_every_refusal_says_why_and_what_to_do():
    for key, entry in REFUSED.items():
        assert entry.why and entry.fix, key
        said = entry.refusal("x")
        assert all(part in said for part in (entry.what, "(here x)", entry.why, entry.fix))
    assert len({entry.what for entry in ENTRIES}) == len(ENTRIES)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.what)
def test_every_line_is_held_by_a_test_that_exists(entry):
    assert entry.tests
    for test in entry.tests:
        path, name, case = re.fullmatch(r"(\S+?)::(\w+)(?:\[(.*)\])?", test).groups()
        tree = ast.parse((ROOT / path).read_text())
        assert name in {f.name for f in tree.body if isinstance(f, ast.FunctionDef)}, test
        texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
        assert case is None or case in texts, f"{test}: no such case"


def test_versions_of_the_page_are_those_that_are_accepted():
    text = (GLUE / "setup.py").read_text()
    versions = re.findall(r"\((\d+), (\d+)\)", re.search(r"^TESTED = (.*)$", text, re.M)[1])
    for file in ("docs/compatibility.md", "docs/installation.md"):
        page = (ROOT / file).read_text()
        assert " and ".join(f"{a}.{b}" for a, b in versions) in page, file
