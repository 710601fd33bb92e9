# SPDX-License-Identifier: Apache-2.0
"""Compares a vLLM with the table, in words that a person can act on."""

from __future__ import annotations

import ast

from . import BODIES, NAMES
from .imports import imported, is_there
from .name import VERSIONS, Body, Name, expected
from .source import Function, Sources, digest, signature


def differences(sources: Sources, version: str, names: tuple[Name, ...] = NAMES) -> list[str]:
    """What the glue would trip over: one text for each name that is not as in `version`.

    Args:
        sources: the vLLM to look at.
        version: one of `VERSIONS`, the column of the table to compare with.
    """
    said = [
        f"vllm.{module.removeprefix('vllm.')}: {name}, imported by sentencekv_vllm/{user}\n"
        "    is gone"
        for user, module, name in imported()
        if not is_there(sources, module, name)
    ]
    for row in names:
        said += [f"{_place(row)}\n    {text}" for text in _wrong(sources, row, version)]
    return said


def _place(row: Name) -> str:
    return f"vllm/{row.file}: {row.name}, {row.how} by sentencekv_vllm/{row.user}"


def _wrong(sources: Sources, row: Name, version: str) -> list[str]:
    node = sources.find(row.file, row.name)
    if node is None:
        return ["is gone"]
    said = []
    if row.signature is not None:
        wanted = expected(row.signature, version)
        found = signature(node) if isinstance(node, Function) else "no function"
        if found != wanted:
            said.append(f"expected ({wanted})\n    found    ({found})")
    source, at = ast.unparse(node), 0
    for part in row.parts:
        at = source.find(part, at)
        if at < 0:
            said.append(
                f"no longer has {part!r} behind the parts before it: {', '.join(row.parts)}"
            )
            break
    return said


def unread(sources: Sources, version: str, bodies: tuple[Body, ...] = BODIES) -> list[str]:
    """Functions that work otherwise than when somebody of us has read them."""
    said = []
    for row in bodies:
        node = sources.find(row.file, row.name)
        found = "gone" if node is None else digest(node)
        if found != expected(row.digests, version):
            said.append(
                f"vllm/{row.file}: {row.name} has another body ({found}); "
                f"sentencekv_vllm/{row.user} relies on it: {row.why}"
            )
    return said


def column(found: str | None) -> str:
    """The column for a vLLM of this version: its own, or the newest for one that is unknown."""
    return found if found in VERSIONS else VERSIONS[-1]
