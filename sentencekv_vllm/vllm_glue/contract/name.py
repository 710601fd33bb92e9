# SPDX-License-Identifier: Apache-2.0
"""One name of vLLM's that the glue leans on, and what we expect of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

VERSIONS = ("0.32", "0.33")
"""Whose sources were read, in order. `setup.TESTED` says which of them are accepted."""

ByVersion = str | Mapping[str, str]
"""What is expected: of every version in `VERSIONS`, or of each."""


class How(StrEnum):
    """What we do with a name."""

    CALLED = "called"
    OVERRIDDEN = "overridden"
    READ = "read"
    SET = "set"
    WRAPPED = "wrapped"
    ORDER = "taken in its order"


@dataclass(frozen=True)
class Name:
    """A function, class, method or field.

    `signature` is parameters with their defaults and without annotations; None: the name's
    presence is what counts. `parts` are found in its source, one after the other.
    """

    file: str  # relative to the package vllm
    name: str  # `function`, `Class`, `Class.method`, `Class.field`
    user: str  # the file of ours, relative to sentencekv_vllm
    how: How
    signature: ByVersion | None = None
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Body:
    """A function of which more than the signature matters, and the digests of what was read."""

    file: str
    name: str
    user: str
    why: str
    digests: ByVersion


def expected(what: ByVersion, version: str) -> str:
    """Of one version of `VERSIONS`."""
    return what if isinstance(what, str) else what[version]


def of(
    file: str,
    owner: str,
    user: str,
    how: How,
    names: Mapping[str, ByVersion | None] | tuple[str, ...],
) -> Iterator[Name]:
    """Rows for names of one class (or of the module, where `owner` is empty)."""
    signatures = names if isinstance(names, Mapping) else dict.fromkeys(names)
    for name, signature in signatures.items():
        yield Name(file, f"{owner}.{name}" if owner else name, user, how, signature)
