# SPDX-License-Identifier: Apache-2.0
"""What our own files import from vLLM: read from them, so that no row can be forgotten."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from .source import Sources, statements

GLUE = Path(__file__).parents[1]


def imported() -> Iterator[tuple[str, str, str]]:
    """(our file, module of vLLM, name) for every import in the glue and the entry point."""
    for file in (GLUE.parent / "plugin.py", *sorted(GLUE.glob("*.py"))):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    yield str(file.relative_to(GLUE.parent)), str(node.module), alias.name


def is_there(sources: Sources, module: str, name: str) -> bool:
    """`from module import name` works, as far as sources can tell."""
    path = "/".join(module.split(".")[1:])
    inside = f"{path}/{name}" if path else name
    if sources.module(f"{inside}.py") or sources.has_folder(inside):
        return True  # a module
    file = f"{path}/__init__.py" if sources.has_folder(path) else f"{path}.py"
    if sources.find(file, name) is not None:
        return True
    tree = sources.module(file)
    # Names that the module fetches when asked (its `__getattr__`) stand in a table of texts.
    return tree is not None and any(
        isinstance(node, ast.Constant) and node.value == name
        for statement in statements(tree.body)
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        for node in ast.walk(statement)
    )
