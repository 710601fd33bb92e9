# SPDX-License-Identifier: Apache-2.0
"""The doctor's engines answer as plain attention does, and have the sizes of a plan."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from sentencekv_vllm.config import SentenceKVConfig  # noqa: E402
from sentencekv_vllm.doctor.finding import State  # noqa: E402
from sentencekv_vllm.doctor.self_test import self_test, start_engines  # noqa: E402
from sentencekv_vllm.doctor.serving import registered, supported  # noqa: E402
from sentencekv_vllm.in_force import in_force  # noqa: E402
from sentencekv_vllm.plan.machine import GIB, Machine  # noqa: E402
from sentencekv_vllm.plan.making import make_plan  # noqa: E402
from sentencekv_vllm.plan.model_shape import read_model  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ours():
    return start_engines()


def test_every_process_knows_the_backend_and_full_equals_plain_attention(ours):
    api = ours["api"]
    findings = [supported(api), registered("API", api), *self_test(ours)]
    assert {f.name: f.state for f in findings} == {f.name: State.OK for f in findings}, findings
    last = findings[-1]
    assert "24 tokens" in last.found and "sparse steps: those of plain attention" in last.found
    assert len({api["pid"], ours["worker"]["pid"]}) == 2, "a worker is no process of the API's"
    assert ours["worker"]["index_bytes"] > 0


def test_a_plan_has_the_sizes_that_the_engine_allocates_and_logs(ours):
    from sentencekv_vllm.vllm_glue.self_test import BLOCK_SIZE, ENGINE, MODEL, SETTINGS

    machine = Machine(GIB, 8 * GIB, kv_cache_bytes=ENGINE["kv_cache_memory_bytes"])
    config, worker = SentenceKVConfig(**SETTINGS), ours["worker"]
    model = read_model(str(MODEL), "auto")
    plan = make_plan(model, machine, 1024, config, BLOCK_SIZE, pool_is_given=True)
    assert plan.capacity.kv_blocks == worker["kv_blocks"]
    assert plan.resolved.host_pool_bytes == worker["host_bytes"]
    assert plan.resolved.index_bytes == worker["index_bytes"]
    assert in_force(plan.resolved) in ours["log"]
