# SPDX-License-Identifier: Apache-2.0
"""The pinned swap pool: exact size, given back, and refused in words where it does not fit."""

from __future__ import annotations

import pytest
import torch

from sentencekv_vllm.config import ConfigError
from sentencekv_vllm.worker import host_memory
from sentencekv_vllm.worker.host_memory import GIB, HostPool, available_bytes

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
    assert available_bytes(meminfo) is None
    meminfo.write_text("MemTotal: 99 kB\nMemFree: 7 kB\nMemAvailable:   12 kB\n")
    assert available_bytes(meminfo) == 12 * 1024
