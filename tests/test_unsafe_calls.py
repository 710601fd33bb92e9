# SPDX-License-Identifier: Apache-2.0
"""Nothing that is read is run: no pickles, no code from text, no shell, no yaml objects."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sentencekv_vllm

PACKAGE = Path(sentencekv_vllm.__path__[0])
SOURCES = [
    *PACKAGE.rglob("*.py"),
    *(PACKAGE.parent / "triton_kernels").rglob("*.py"),
]
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__"),
    *("pickle.load", "pickle.loads", "marshal.loads", "shelve.open", "torch.load", "numpy.load"),
    *("np.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen"),
    *("tempfile.mktemp",),
}


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def unsafe(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        tensors_only = any(
            k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords
        )
        if called(node) in FORBIDDEN and not (called(node) == "torch.load" and tensors_only):
            found.append(f"line {node.lineno}: {called(node)}")
        if any(k.arg == "shell" and ast.unparse(k.value) != "False" for k in node.keywords):
            found.append(f"line {node.lineno}: a shell")
        # Objects over a connection of `multiprocessing` are pickles; bytes are not.
        if called(node).endswith(("connection.recv", "connection.send", "ours.send")):
            found.append(f"line {node.lineno}: {called(node)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_nothing_that_is_read_is_run(path):
    assert not unsafe(path.read_text())


@pytest.mark.parametrize(
    "source",
    ["eval(x)", "pickle.loads(x)", "subprocess.run(x, shell=True)", "self.connection.recv()"],
)
def test_the_search_finds_what_it_is_for(source):
    assert len(unsafe(source)) == 1
