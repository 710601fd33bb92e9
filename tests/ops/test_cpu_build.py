# SPDX-License-Identifier: Apache-2.0
"""How the CPU ops are found, and what happens to OpenMP."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys

import pytest

from sentencekv_vllm.ops import cpu, load
from sentencekv_vllm.ops.layer_ops import ReferenceOps
from sentencekv_vllm.ops.native_build import BuildError

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture
def load_layer_ops():
    """Without what other tests have loaded, and leaving nothing behind."""
    load.load_layer_ops.cache_clear()
    yield load.load_layer_ops
    load.load_layer_ops.cache_clear()


@needs_gxx
def test_one_instance_per_process(load_layer_ops) -> None:
    assert isinstance(load_layer_ops("cpu"), cpu.CpuOps)
    assert load_layer_ops("cpu") is load_layer_ops("cpu")


def test_falls_back_to_the_reference_with_one_warning(
    load_layer_ops, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise BuildError("cannot run g++: No such file or directory")

    monkeypatch.setattr(cpu, "load_library", fail)
    with caplog.at_level(logging.WARNING):
        assert isinstance(load_layer_ops("cpu"), ReferenceOps)
        load_layer_ops("cpu")
    (record,) = caplog.records
    assert "cannot run g++" in record.getMessage() and "Install g++" in record.getMessage()


def test_unknown_devices_are_refused(load_layer_ops) -> None:
    with pytest.raises(ValueError, match="'tpu'"):
        load_layer_ops("tpu")


THREADS = """
import os, pathlib, torch
from sentencekv_vllm.ops.basis import plain_basis
from sentencekv_vllm.ops.load import load_layer_ops
from sentencekv_vllm.types import LayerPools

def runtimes():
    maps = pathlib.Path("/proc/self/maps").read_text().split()
    return {m for m in maps if "libgomp" in m or "libiomp" in m or "libomp" in m}

def zeros(*shape, dtype=torch.int32):
    return torch.zeros(shape, dtype=dtype)

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
before = runtimes()
ops = load_layer_ops("cpu")
assert ops.name == "cpu", ops
cache = zeros(2, 4, 16, 16, dtype=torch.bfloat16)  # small: torch itself starts no thread for it
pools = LayerPools(
    cache, cache.clone(), zeros(2, 4), zeros(2, 4), zeros(2, 4),
    codes=zeros(2, 4, 1, 16, dtype=torch.uint8), scales=zeros(2, 4, 16, dtype=torch.bfloat16),
    means=zeros(2, 4, 8, dtype=torch.int8), mean_scales=zeros(2, 4, dtype=torch.float32),
    page_kept=zeros(2, 4, dtype=torch.uint8), basis=plain_basis(4, 8, 8),
)
offset = torch.arange(128, dtype=torch.int32)
ids = torch.arange(2, dtype=torch.int32)
threads = len(os.listdir("/proc/self/task"))
ops.index_pages(pools, ids, ids, offset)
assert runtimes() == before, runtimes() - before
print(len(before), len(os.listdir("/proc/self/task")) - threads)
"""


@needs_gxx
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
@pytest.mark.parametrize(("threads", "started"), [(1, 0), (3, 2)])
def test_threads_come_from_the_openmp_of_torch(threads: int, started: int) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", THREADS],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", str(started)]
