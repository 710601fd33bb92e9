# SPDX-License-Identifier: Apache-2.0
"""Swap pools that cannot all be filled are refused at start, with numbers."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from sentencekv_vllm.config import ConfigError, SentenceKVConfig
from sentencekv_vllm.resolved import GIB, resolve
from sentencekv_vllm.worker import host_check, host_memory
from sentencekv_vllm.worker.host_check import check_pools_fit

MODEL = {"block_size": 32, "num_kv_heads": 2, "head_dim": 64, "num_layers": 4, "dtype_size": 2}


@pytest.fixture
def four_gib():
    return resolve(SentenceKVConfig(), **MODEL)


@pytest.fixture
def free(monkeypatch):
    def set_to(gib):
        value = None if gib is None else int(gib * GIB)
        monkeypatch.setattr(host_check, "available_bytes", lambda: value)

    return set_to


def test_a_pool_larger_than_free_memory_is_refused_with_numbers_and_a_fix_that_works(
    four_gib, free
):
    free(3.5)
    with pytest.raises(ConfigError, match=r"takes 4.00 GiB, 3.50 GiB .*: set it to at most 3.50"):
        check_pools_fit(four_gib, 1)
    check_pools_fit(resolve(SentenceKVConfig(host_pool_gib=3.5), **MODEL), 1)


def test_all_workers_of_the_machine_are_counted_together(four_gib, free):
    free(9)
    check_pools_fit(four_gib, 2)
    with pytest.raises(ConfigError, match=r"4 worker.* 16.00 GiB, 9.00 GiB .* at most 2.25"):
        check_pools_fit(four_gib, 4)


def test_a_system_that_tells_nothing_refuses_nothing(four_gib, free):
    free(None)
    check_pools_fit(four_gib, 1000)


def test_kv_caches_in_host_memory_are_warned_of(four_gib, free, caplog):
    free(9)
    with caplog.at_level(logging.WARNING, "sentencekv_vllm"):
        check_pools_fit(four_gib, 1, cache_bytes=4 * GIB)
        assert not caplog.records
        check_pools_fit(four_gib, 1, cache_bytes=6 * GIB)
    assert "4.00 GiB and KV caches of 6.00 GiB are more than the 9.00 GiB" in caplog.text


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_control_group_counts(four_gib, monkeypatch, tmp_path, version):
    meminfo, own, root = tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "groups"
    meminfo.write_text(f"MemAvailable: {64 * GIB // 1024} kB\n")
    names = ("memory.max", "memory.current")
    own.write_text("0::/job\n")
    group = root / "job"
    if version == 1:
        own.write_text("7:cpu:/job\n3:memory:/job\n")
        names, group = ("memory.limit_in_bytes", "memory.usage_in_bytes"), root / "memory" / "job"
    group.mkdir(parents=True)
    for name, gib in zip(names, (8, 5), strict=True):
        (group / name).write_text(f"{gib * GIB}\n")
    monkeypatch.setattr(
        host_check,
        "available_bytes",
        lambda: min(host_memory.machine_bytes(meminfo), host_memory.cgroup_bytes(own, root)),
    )
    with pytest.raises(ConfigError, match=r"4.00 GiB, 3.00 GiB"):
        check_pools_fit(four_gib, 1)


@pytest.mark.parametrize(("ranks", "engines", "workers"), [(1, 1, 1), (4, 2, 8), (2, 0, 2)])
def test_ranks_and_engines_of_a_machine_are_its_workers(ranks, engines, workers):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from sentencekv_vllm.vllm_glue.setup import local_workers

    parallel = SimpleNamespace(local_world_size=ranks, data_parallel_size_local=engines)
    assert local_workers(parallel) == workers
