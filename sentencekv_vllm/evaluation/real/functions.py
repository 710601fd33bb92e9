# SPDX-License-Identifier: Apache-2.0
"""Functions of real Python files: of a folder, or of the standard library."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .files import RealTextError, parse, read_all, standard_library

CHARACTERS = range(250, 1200)
"""Of a function that is taken: one that fits a reply and has something to say."""


@dataclass(frozen=True)
class Function:
    """A function as it stands in its file, without decorators."""

    name: str
    source: str


@lru_cache(maxsize=4)
def functions(folder: str | None = None) -> tuple[Function, ...]:
    """Functions outside classes, in the order of files and lines; of each name the first.

    Args:
        folder: of Python files, read with all folders below. None: the standard library.

    Raises:
        RealTextError: the folder has no such function.
    """
    if folder is None:
        return _distinct(python_files(None))
    found = _distinct(python_files(folder))
    if not found:
        raise RealTextError(
            f"{folder} holds no Python function of {CHARACTERS.start} to {CHARACTERS.stop} "
            "characters: name a folder of Python files with --code-folder"
        )
    return found


def python_files(folder: str | None) -> Iterator[str]:
    """Of a folder; None: of the standard library."""
    return standard_library() if folder is None else read_all(Path(folder), (".py",))


def _distinct(sources: Iterable[str]) -> tuple[Function, ...]:
    found: dict[str, Function] = {}
    for function in (f for source in sources for f in _functions(source)):
        found.setdefault(function.name, function)
    return tuple(found.values())


def _functions(source: str) -> Iterator[Function]:
    lines = source.splitlines(keepends=True)
    for node in parse(source).body:
        if isinstance(node, ast.FunctionDef):
            # Not `ast.get_source_segment`, which splits the whole source again each time.
            text = "".join(lines[node.lineno - 1 : node.end_lineno]).rstrip()
            if len(text) in CHARACTERS:
                yield Function(node.name, text)
