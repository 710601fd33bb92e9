# SPDX-License-Identifier: Apache-2.0
"""A file gives back what was saved, or says why it is of no use."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sentencekv_vllm.ops.basis import Axes
from sentencekv_vllm.ops.basis_file import (
    USER_TEXT,
    BasisFile,
    BasisFileError,
    basis_path,
    load_basis,
    read_basis,
    save_basis,
)

HEADS, DIM, NAME = 2, 8, "5" * 64


def axes(seed: int = 0) -> Axes:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(HEADS, DIM, DIM, dtype=torch.float64, generator=generator)
    keys += 3 * torch.eye(DIM)
    mean = torch.randn(HEADS, DIM, generator=generator)
    return Axes(keys.float(), torch.linalg.inv(keys).mT.float(), mean)


CONTENTS = BasisFile(NAME, "bundled 1", 100, (axes(0), axes(1)))


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("SENTENCEKV_CACHE_DIR", str(tmp_path / "cache"))
    return basis_path(NAME)


def load(path):
    return load_basis(path, NAME, [HEADS, HEADS], DIM)


def test_a_file_gives_back_what_was_saved(path):
    save_basis(path, CONTENTS)
    found = load(path)
    assert (found.identity, found.source, found.tokens) == (NAME, "bundled 1", 100)
    assert not found.is_users
    for mine, saved in zip(found.layers, CONTENTS.layers, strict=True):
        for part in ("keys", "queries", "mean"):
            assert torch.equal(getattr(mine, part), getattr(saved, part))


def test_equal_contents_are_equal_bytes_and_nothing_else_is_left(path):
    save_basis(path, CONTENTS)
    first = path.read_bytes()
    save_basis(path, CONTENTS)
    assert path.read_bytes() == first
    assert list(path.parent.iterdir()) == [path]


def test_a_file_of_the_users_text_says_so(path):
    save_basis(path, replace(CONTENTS, source=f"{USER_TEXT}abc"))
    assert load(path).is_users


def test_no_file(path):
    with pytest.raises(FileNotFoundError):
        load(path)


@pytest.mark.parametrize("place", [0, 30, 60, 2000, -1])
def test_one_changed_byte_is_found(path, place):
    save_basis(path, CONTENTS)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BasisFileError):
        load(path)


@pytest.mark.parametrize("length", [0, 10, 40, 1000])
def test_a_file_cut_short_is_found(path, length):
    save_basis(path, CONTENTS)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(BasisFileError):
        read_basis(path)


@pytest.mark.parametrize(
    "changed, reason",
    [
        (replace(CONTENTS, identity="6" * 64), "another model"),
        (replace(CONTENTS, layers=CONTENTS.layers[:1]), "1 layers, the model 2"),
        (
            replace(CONTENTS, layers=(replace(axes(), mean=torch.zeros(HEADS, 4)), axes())),
            "shapes",
        ),
        (
            replace(
                CONTENTS, layers=(replace(axes(), mean=torch.full((HEADS, DIM), torch.nan)), axes())
            ),
            "not finite",
        ),
        (
            replace(CONTENTS, layers=(replace(axes(), queries=axes(7).queries), axes())),
            "keep products",
        ),
    ],
)
def test_a_file_of_something_else_is_refused_with_the_reason(path, changed, reason):
    save_basis(path, changed)
    with pytest.raises(BasisFileError, match=reason):
        load(path)


def test_a_file_that_runs_code_when_unpickled_is_refused(path):
    import hashlib
    import io

    from sentencekv_vllm.ops.basis_file import MAGIC

    class Bomb:
        def __reduce__(self):
            return (path.with_name("ran").write_text, ("",))

    buffer = io.BytesIO()
    torch.save({"axes": Bomb()}, buffer)
    data = buffer.getvalue()
    path.write_bytes(MAGIC + hashlib.sha256(data).digest() + data)
    with pytest.raises(BasisFileError):
        read_basis(path)
    assert not path.with_name("ran").exists()
