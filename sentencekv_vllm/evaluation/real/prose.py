# SPDX-License-Identifier: Apache-2.0
"""Paragraphs of real prose: of a folder, of Python's manuals, or of docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from .files import RealTextError, parse, read_all, standard_library

Paragraph = tuple[str, ...]
"""Sentences of one line each, with their marks."""

MANUALS = "/usr/share/doc"
"""Debian's packages python3.*-doc put the manuals' reStructuredText below."""
TEXTS = (".txt", ".rst", ".md")
SHORTEST = 80  # characters of a paragraph: less is a heading or a caption
MARKUP = tuple(".>=*-#|+:<~{[!$`@")  # what a paragraph that is no prose begins with
_ROLE = re.compile(r":[a-z:]+:`[~!]?([^`<]*?)(?:\s*<[^>]*>)?`")  # reStructuredText
_URL = re.compile(r"`([^`<]+?)\s*<[^>`]*>`_+")
_REFERENCE = re.compile(r"\b(\w+[a-z0-9])_(?=[\s.,;)])")
_RULE = re.compile(r"^\s*([=~^*#\"'+-])\1{3,}\s*$", re.MULTILINE)  # under a heading
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")  # Markdown
_INLINE = re.compile(r"``([^`]*)``|`([^`]*)`_*|\*\*?([^*]+)\*\*?")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_END = re.compile(r"(?<=[.!?]) (?=[A-Z\"“(])")


def split_paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of a text, reStructuredText or Markdown, in one line each, without markup.

    Blocks of code, lists, tables, headings and directives are left out.
    """
    for block in re.split(r"\n\s*\n", _FENCE.sub("", text)):
        # Indented by a tab or three spaces: code, or the body of a directive.
        if block.startswith(("   ", "\t")) or block.lstrip().startswith(MARKUP):
            continue
        if _RULE.search(block):
            continue
        plain = block
        for markup in (_ROLE, _URL, _REFERENCE, _LINK):
            plain = markup.sub(r"\1", plain)
        plain = _INLINE.sub(lambda m: m[1] or m[2] or m[3] or "", plain)
        plain = re.sub(r"\s+", " ", plain).strip()
        if len(plain) >= SHORTEST and "::" not in plain and "`" not in plain:
            yield plain


def sentences(paragraph: str) -> Paragraph:
    """A paragraph's sentences: joined by spaces they are the paragraph."""
    return tuple(_END.split(paragraph))


@lru_cache(maxsize=4)
def prose(folder: str | None = None) -> tuple[Paragraph, ...]:
    """Paragraphs in the order of files and text; each once.

    Args:
        folder: of `TEXTS`, read with all folders below. None: Python's manuals where Debian's
            python3.*-doc is installed, else docstrings of the standard library, which are always
            there.

    Raises:
        RealTextError: the folder has no paragraph.
    """
    if folder is not None:
        texts = read_all(Path(folder), TEXTS)
        found = _distinct(texts)
        if not found:
            raise RealTextError(
                f"{folder} holds no paragraph of {SHORTEST} characters in {', '.join(TEXTS)}: "
                "name a folder of prose with --text-folder"
            )
        return found
    for manuals in sorted(Path(MANUALS).glob("python3.*/html/_sources")):
        if found := _distinct(read_all(manuals, TEXTS)):
            return found
    return _distinct(docstrings())


def docstrings() -> Iterator[str]:
    """Of modules, classes and functions of the standard library."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for source in standard_library():
        for node in ast.walk(parse(source)):
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                yield text


def _distinct(texts: Iterable[str]) -> tuple[Paragraph, ...]:
    """A text that is quoted must be there once."""
    found = dict.fromkeys(p for text in texts for p in split_paragraphs(text))
    return tuple(map(sentences, found))
