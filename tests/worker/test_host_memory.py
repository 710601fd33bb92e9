# SPDX-License-Identifier: Apache-2.0
"""The pinned swap pool: exact size, given back, and refused in words where it does not fit."""

from __future__ import annotations

import pytest
import torch

from sentencekv_vllm.config import ConfigError
from sentencekv_vllm.worker import host_memory
from sentencekv_vllm.worker.host_memory import (
    GIB,
    HostPool,
    available_bytes,
    cgroup_bytes,
    machine_bytes,
)

SHAPE = (3, 5, 7)  # 210 bytes of bf16: not a power of two


class FakeDriver:
    def __init__(self, status=0):
        self.status, self.pinned = status, {}

    def cudaHostRegister(self, address, size, flags):  # noqa: N802  # the driver's name
        self.pinned[address] = size
        return self.status

    def cudaHostUnregister(self, address):  # noqa: N802
        del self.pinned[address]


@pytest.fixture
def driver(monkeypatch):
    driver = FakeDriver()
    monkeypatch.setattr(host_memory, "_cudart", lambda: driver)
    return driver


def test_the_pool_is_pinned_at_its_size_and_unpinned_once(driver):
    pool = HostPool(SHAPE, torch.bfloat16, pinned=True)
    assert driver.pinned == {pool.tensor.data_ptr(): 210}
    pool.close()
    pool.close()
    assert not driver.pinned


def test_on_the_cpu_nothing_is_pinned_nor_checked(driver, monkeypatch):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 0)
    assert HostPool(SHAPE, torch.bfloat16, pinned=False).tensor.shape == SHAPE
    assert not driver.pinned


def test_a_pool_larger_than_the_memory_is_refused_before_it_is_allocated(driver, monkeypatch):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: GIB // 2)
    with pytest.raises(ConfigError, match=r"512.00 GiB, 0.50 GiB are free: lower host_pool_gib"):
        HostPool((GIB, 128, 2), torch.bfloat16, pinned=True)
    assert not driver.pinned


def test_the_drivers_refusal_is_passed_on(driver):
    driver.status = 2
    with pytest.raises(ConfigError, match="CUDA error 2.*lower host_pool_gib.*ulimit"):
        HostPool(SHAPE, torch.bfloat16, pinned=True)


def test_free_memory_is_what_the_system_says(tmp_path):
    meminfo = tmp_path / "meminfo"
    assert machine_bytes(meminfo) is None
    meminfo.write_text("MemTotal: 99 kB\nMemFree: 7 kB\nMemAvailable:   12 kB\n")
    assert machine_bytes(meminfo) == 12 * 1024


def group(folder, limit, usage, names=("memory.max", "memory.current")):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, usage), strict=True):
        (folder / name).write_text(f"{value}\n")


def test_the_tightest_control_group_around_the_process_counts(tmp_path):
    own, root = tmp_path / "own", tmp_path / "tree"
    assert cgroup_bytes(own, root) is None
    own.write_text("0::/service/pod\n")
    assert cgroup_bytes(own, root) is None, "nothing is mounted"
    group(root / "service" / "pod", "max", 5)
    assert cgroup_bytes(own, root) is None, "no limit"
    group(root / "service", 100, 70)
    assert cgroup_bytes(own, root) == 30, "a group further out has one"
    group(root / "service" / "pod", 40, 25)
    assert cgroup_bytes(own, root) == 15
    group(root / "service" / "pod", 40, 60)
    assert cgroup_bytes(own, root) == 0
    group(root / "elsewhere", 3, 1)
    assert cgroup_bytes(own, root) == 0
    (root / "service" / "pod" / "memory.stat").write_text("anon 2\ninactive_file 28\n")
    assert cgroup_bytes(own, root) == 8, "files in the cache are given back"


def test_a_container_sees_its_own_group_as_the_root(tmp_path):
    own, root = tmp_path / "own", tmp_path / "tree"
    own.write_text("0::/kubepods/pod7\n")
    group(root, 900, 100)
    assert cgroup_bytes(own, root) == 800


def test_version_1_has_a_tree_for_memory(tmp_path):
    own, root = tmp_path / "own", tmp_path / "tree"
    own.write_text("4:cpu,cpuacct:/a\n3:memory:/b\n")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    group(root / "memory" / "b", 64, 60, names)
    group(root / "memory" / "a", 2, 1, names)
    assert cgroup_bytes(own, root) == 4


@pytest.mark.parametrize(
    ("machine", "groups", "free"),
    [(7, 5, 5), (4, 9, 4), (None, 3, 3), (6, None, 6), (None, None, None)],
)
def test_machine_and_groups_both_bind(machine, groups, free, monkeypatch):
    monkeypatch.setattr(host_memory, "machine_bytes", lambda: machine)
    monkeypatch.setattr(host_memory, "cgroup_bytes", lambda: groups)
    assert available_bytes() == free
