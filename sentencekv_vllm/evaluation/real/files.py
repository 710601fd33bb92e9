# SPDX-License-Identifier: Apache-2.0
"""Text files of a folder, and the sources of Python's standard library."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..benchmark_files import BenchmarkFileError

# Tests, tables of characters, what others install, and programs rather than modules.
NOT_LIBRARY = (
    "test tests idle_test site-packages dist-packages encodings pydoc_data "
    "idlelib lib2to3 tkinter turtledemo ensurepip"
)


class RealTextError(BenchmarkFileError):
    """There is not the text, or not the room, that a question needs; the message says which."""


def read_all(folder: Path, endings: tuple[str, ...]) -> Iterator[str]:
    """The files with these endings, in the order of their paths; those not in UTF-8 are left out.

    Raises:
        RealTextError: no such folder.
    """
    if not folder.is_dir():
        raise RealTextError(f"{folder} is no folder: name one that holds {', '.join(endings)}")
    for path in sorted(folder.rglob("*")):
        if path.suffix in endings and path.is_file():
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def standard_library() -> Iterator[str]:
    """Sources of its modules but for `NOT_LIBRARY`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not set(path.relative_to(root).parts) & set(NOT_LIBRARY.split()):
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def parse(source: str) -> ast.Module:
    """The syntax tree; an empty one of what this Python cannot read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old spellings in other people's files
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return ast.Module([], [])
