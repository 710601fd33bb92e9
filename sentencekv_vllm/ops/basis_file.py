# SPDX-License-Identifier: Apache-2.0
"""Files of calibrated axes: one for each model, share of its heads and block size."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .basis import Axes
from .build_cache import cache_dirs

MAGIC = b"sentencekv basis 1\n"
USER_TEXT = "user "
"""What the source of a calibration with a text of the user's begins with."""


class BasisFileError(ValueError):
    """The file is damaged, or of something else; the message says which."""


@dataclass(frozen=True)
class BasisFile:
    """The contents of a file."""

    identity: str  # digest of what the axes are of: model, heads, block size
    source: str  # which text they were found with
    tokens: int  # that were counted
    layers: tuple[Axes, ...]  # float32

    @property
    def is_users(self) -> bool:
        return self.source.startswith(USER_TEXT)


def text_digest(text: str) -> str:
    """Names a text in `BasisFile.source`."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def basis_folder() -> Path:
    """Where all files are; made if missing.

    Raises:
        OSError: it cannot be made.
    """
    folder = cache_dirs()[-1] / "bases"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def basis_path(identity: str) -> Path:
    """Where the file of an identity is; the folder exists.

    Raises:
        OSError: the folder cannot be made.
    """
    return basis_folder() / f"{identity[:32]}.basis"


def save_basis(path: Path, contents: BasisFile) -> None:
    """Write a file, whole or not at all. Equal contents give equal bytes.

    Raises:
        OSError: it cannot be written.
    """
    record = {
        "identity": contents.identity,
        "source": contents.source,
        "tokens": contents.tokens,
        "axes": [[x.keys, x.queries, x.mean] for x in contents.layers],
    }
    buffer = io.BytesIO()
    torch.save(record, buffer)
    data = buffer.getvalue()
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(MAGIC + hashlib.sha256(data).digest() + data)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_basis(path: Path, identity: str, heads: Sequence[int], head_dim: int) -> BasisFile:
    """Read a file.

    Args:
        heads: KV heads of each layer.

    Raises:
        FileNotFoundError: there is none.
        BasisFileError: it is damaged, or not of this identity and these shapes.
    """
    contents = read_basis(path)
    if contents.identity != identity:
        raise BasisFileError("it is of another model")
    if len(contents.layers) != len(heads):
        raise BasisFileError(f"it has {len(contents.layers)} layers, the model {len(heads)}")
    for axes, count in zip(contents.layers, heads, strict=True):
        _check(axes, count, head_dim)
    return contents


def read_basis(path: Path) -> BasisFile:
    """Read a file of any model.

    Raises:
        FileNotFoundError: there is none.
        BasisFileError: it is damaged.
    """
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BasisFileError(f"it cannot be read: {error.strerror}") from error
    digest, data = found[len(MAGIC) : len(MAGIC) + 32], found[len(MAGIC) + 32 :]
    if not found.startswith(MAGIC):
        raise BasisFileError("it is no file of axes")
    if hashlib.sha256(data).digest() != digest:
        raise BasisFileError("it is damaged")
    try:
        record: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
        layers = tuple(Axes(*map(_tensor, parts)) for parts in record["axes"])
        names = (str(record["identity"]), str(record["source"]))
        return BasisFile(*names, int(record["tokens"]), layers)
    except Exception as error:  # whatever the reader finds wrong with it
        raise BasisFileError(f"it cannot be read: {error}") from error


def _tensor(part: Any) -> Tensor:
    if not isinstance(part, Tensor):
        raise TypeError(f"no tensor, but {type(part).__name__}")
    return part


def _check(axes: Axes, heads: int, head_dim: int) -> None:
    shapes = [tuple(part.shape) for part in (axes.keys, axes.queries, axes.mean)]
    square = (heads, head_dim, head_dim)
    if shapes != [square, square, (heads, head_dim)]:
        raise BasisFileError(f"its shapes are {shapes}")
    if not all(bool(part.isfinite().all()) for part in (axes.keys, axes.queries, axes.mean)):
        raise BasisFileError("it has numbers that are not finite")
    products = axes.queries.double() @ axes.keys.double().transpose(1, 2)
    if not torch.allclose(products, torch.eye(head_dim).double().expand(square), atol=1e-2):
        raise BasisFileError("its maps do not keep products of queries and keys")
