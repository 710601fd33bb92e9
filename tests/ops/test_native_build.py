# SPDX-License-Identifier: Apache-2.0
"""The build cache: one build per content, nothing half-written, errors that explain."""

from __future__ import annotations

import ctypes
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sentencekv_vllm.ops import native_build
from sentencekv_vllm.ops.native_build import BuildError, build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SENTENCEKV_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "answer.h").write_text("#define ANSWER 42\n")
    (tmp_path / "answer.cpp").write_text(
        '#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n'
    )
    return tmp_path


def make(project: Path, *flags: str) -> Path:
    include = project / "include"

    def command(sources, output):
        return ["g++", "-shared", "-fPIC", f"-I{include}", *flags, *map(str, sources), "-o",
                str(output)]  # fmt: skip

    return build("answer", [project / "answer.cpp"], command, [include])


def test_a_second_call_returns_the_same_library_without_compiling(project, monkeypatch) -> None:
    library = make(project)
    assert ctypes.CDLL(str(library)).answer() == 42
    before = library.stat().st_mtime_ns
    assert make(project) == library and library.stat().st_mtime_ns == before


def test_a_changed_header_or_flag_is_another_library(project) -> None:
    first = make(project)
    assert make(project, "-O1") != first
    (project / "include" / "answer.h").write_text("#define ANSWER 43\n")
    assert ctypes.CDLL(str(make(project))).answer() == 43


def test_concurrent_calls_agree_and_leave_no_partial_file(project) -> None:
    with ThreadPoolExecutor(4) as pool:
        libraries = set(pool.map(lambda _: make(project), range(4)))
    assert len(libraries) == 1
    assert not list((project / "cache").glob("*.tmp"))


def test_a_failed_build_shows_the_compilers_words_and_leaves_no_library(project) -> None:
    (project / "answer.cpp").write_text("int answer( {\n")
    with pytest.raises(BuildError, match=r"error"):
        make(project)
    assert not list((project / "cache").glob("*.so"))


def test_a_missing_compiler_is_named(project) -> None:
    with pytest.raises(BuildError, match="cannot run no-such-compiler"):
        build("x", [project / "answer.cpp"], lambda s, o: ["no-such-compiler"], [])


def test_sources_are_found() -> None:
    assert (native_build.csrc_dir() / "include" / "sentencekv").is_dir()
