# SPDX-License-Identifier: Apache-2.0
"""Whatever the home folder is, built kernels find a place that is this user's alone."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path

import pytest

from sentencekv_vllm.ops import build_cache
from sentencekv_vllm.ops.build_cache import cache_dirs, locked
from sentencekv_vllm.ops.native_build import build


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """A folder for temporary files of our own, and nothing remembered."""
    build_cache._cache_dirs.cache_clear()
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    build_cache._cache_dirs.cache_clear()


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_folder_that_can_be_written_is_the_only_one(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SENTENCEKV_CACHE_DIR", str(tmp_path / "new" / "cache"))
    (path,) = cache_dirs()
    assert path == tmp_path / "new" / "cache" and mode(path) == 0o700
    assert not list(path.iterdir()) and not caplog.records


UNUSABLE = {
    "proc": "/proc/self",
    "a file in the way": "{tmp}/file/cache",
    "no such device": "/dev/null/cache",
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_folder_that_cannot_be_written_falls_back_with_advice(
    case, tmp_path, temporary, monkeypatch, caplog
):
    (tmp_path / "file").touch()
    chosen = UNUSABLE[case].format(tmp=tmp_path)
    monkeypatch.setenv("SENTENCEKV_CACHE_DIR", chosen)
    with caplog.at_level(logging.WARNING, "sentencekv_vllm"):
        wanted, fallback = cache_dirs()
        assert cache_dirs() == [wanted, fallback]
    assert wanted == Path(chosen)
    assert fallback == temporary / f"sentencekv_vllm-{os.getuid()}" and mode(fallback) == 0o700
    assert len(caplog.records) == 1
    assert "Set SENTENCEKV_CACHE_DIR to a folder" in caplog.text and chosen in caplog.text


@pytest.mark.parametrize("has_home", [True, False])
def test_a_home_that_is_not_there_falls_back(has_home, temporary, monkeypatch):
    monkeypatch.delenv("SENTENCEKV_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", "/proc/self/no-home")
    if not has_home:

        def expanduser(path):
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "expanduser", expanduser)
    assert cache_dirs()[-1].parent == temporary


@pytest.mark.parametrize("trap", ["open to others", "a link"])
def test_a_temporary_folder_that_others_may_write_to_is_not_used(trap, temporary, tmp_path):
    name = temporary / f"sentencekv_vllm-{os.getuid()}"
    if trap == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        name.symlink_to(tmp_path / "elsewhere")
    else:
        name.mkdir()
        name.chmod(0o777)
    found = build_cache._temporary()
    assert found != name and found.parent == temporary and mode(found) == 0o700


def test_a_full_disk_falls_back(tmp_path, temporary, monkeypatch):
    monkeypatch.setenv("SENTENCEKV_CACHE_DIR", str(tmp_path / "cache"))

    def full(folder):
        if folder.parent != temporary:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build_cache, "_try", full)
    assert cache_dirs()[-1].parent == temporary


def test_file_systems_without_locks_are_built_on_all_the_same(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "x.lock"):
        pass


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_what_was_built_before_is_used_where_nothing_can_be_written(tmp_path, monkeypatch):
    source = tmp_path / "x.cpp"
    source.write_text('extern "C" int x() { return 1; }\n')

    def command(sources, output):
        return ["g++", "-shared", "-fPIC", *map(str, sources), "-o", str(output)]

    monkeypatch.setenv("SENTENCEKV_CACHE_DIR", str(tmp_path / "cache"))
    library = build("x", [source], command, [])
    build_cache._cache_dirs.cache_clear()

    def read_only(folder):
        if folder == tmp_path / "cache":
            raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(build_cache, "_try", read_only)
    assert len(cache_dirs()) == 2
    assert build("x", [source], command, []) == library


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_cpu_ops_load_from_the_fallback(monkeypatch):
    from sentencekv_vllm.ops.cpu_build import load_library

    monkeypatch.setenv("SENTENCEKV_CACHE_DIR", "/proc/self")
    assert load_library() is not None
