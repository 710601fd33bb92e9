# SPDX-License-Identifier: Apache-2.0
"""Reads the Python sources of a vLLM that need not be installed: a folder or a wheel."""

from __future__ import annotations

import ast
import hashlib
import re
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib.resources.abc import Traversable
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Sources:
    """Of one vLLM."""

    def __init__(self, path: Path) -> None:
        """`path`: a wheel, an unpacked wheel, or the package's own folder.

        Raises:
            ValueError: there is no package `vllm`.
        """
        self.path = path
        root: Traversable = zipfile.Path(path) if zipfile.is_zipfile(path) else path
        is_package = (root / "v1").is_dir() and (root / "__init__.py").is_file()
        self.package = root if is_package else root / "vllm"
        self._beside: Traversable = path.parent if is_package else root
        if not (self.package / "__init__.py").is_file():
            raise ValueError(
                f"{path} holds no package vllm: give a wheel, an unpacked one, or the folder vllm"
            )
        self.module = cache(self._module)

    def _module(self, file: str) -> ast.Module | None:
        place = self.package.joinpath(*file.split("/"))
        return ast.parse(place.read_text("utf-8")) if place.is_file() else None

    def has_folder(self, folder: str) -> bool:
        return self.package.joinpath(*folder.split("/")).is_dir()

    def find(self, file: str, name: str) -> ast.AST | None:
        """The node of `function`, `Class.method` or `Class.field` in a file; None: gone."""
        node: ast.AST | None = self.module(file)
        for part in name.split("."):
            if node is None:
                return None
            node = _member(node, part)
        return node

    def version(self) -> str | None:
        """`major.minor` by the metadata beside the package, or by its version file."""
        for entry in self._beside.iterdir():
            found = re.fullmatch(r"vllm(?:_cpu)?-(\d+\.\d+)\..*\.dist-info", entry.name)
            if found:
                return found[1]
        file = self.package / "_version.py"
        text = file.read_text("utf-8") if file.is_file() else ""
        found = re.search(r"version = '(\d+\.\d+)", text)
        return found[1] if found else None


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a module or a class, those under `if`, `try` and `with` among them."""
    for statement in body:
        yield statement
        if not isinstance(statement, Function | ast.ClassDef):
            for field in ("body", "orelse", "finalbody"):
                yield from statements(getattr(statement, field, []))
            for handler in getattr(statement, "handlers", []):
                yield from statements(handler.body)


def _targets(statement: ast.AST) -> list[ast.expr]:
    if isinstance(statement, ast.AnnAssign | ast.AugAssign):
        return [statement.target]
    return list(statement.targets) if isinstance(statement, ast.Assign) else []


def _member(owner: ast.AST, name: str) -> ast.AST | None:
    found: ast.AST | None = None
    for statement in statements(getattr(owner, "body", [])):
        if getattr(statement, "name", None) == name:
            found = statement  # the last one counts, as in Python; overloads come before
        elif any(getattr(target, "id", None) == name for target in _targets(statement)):
            found = statement
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            names = (alias.asname or alias.name for alias in statement.names)
            found = statement if name in names else found
    if found is None and isinstance(owner, ast.ClassDef):
        found = _attribute_of_self(owner, name)
    return found


def _attribute_of_self(owner: ast.ClassDef, name: str) -> ast.AST | None:
    for node in ast.walk(owner):
        for target in _targets(node):
            for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                if isinstance(part, ast.Attribute) and part.attr == name:
                    value = part.value
                    if isinstance(value, ast.Name) and value.id == "self":
                        return node
    return None


def signature(function: Function) -> str:
    """Parameters with defaults, without annotations: `self, request, limit=None`."""
    arguments = ast.parse(ast.unparse(function)).body[0].args  # type: ignore[attr-defined]
    for node in ast.walk(arguments):
        if isinstance(node, ast.arg):
            node.annotation = None
    return ast.unparse(arguments)


def digest(function: ast.AST) -> str:
    """Of what a function does, without comments and docstrings; the same under every Python."""
    return hashlib.sha256(_canonical(function).encode()).hexdigest()[:10]


def _canonical(value: object) -> str:
    if isinstance(value, list):
        return "[" + ",".join(map(_canonical, value)) + "]"
    if not isinstance(value, ast.AST):
        return repr(value)
    fields = dict(ast.iter_fields(value))
    body = fields.get("body")
    if isinstance(body, list) and body and _is_text(body[0]):
        fields["body"] = body[1:]
    # Newer Pythons have fields that are empty in older sources.
    kept = {k: v for k, v in fields.items() if v not in (None, []) and k != "kind"}
    inner = ",".join(f"{name}={_canonical(field)}" for name, field in kept.items())
    return f"{type(value).__name__}({inner})"


def _is_text(statement: object) -> bool:
    value = getattr(statement, "value", None) if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)
