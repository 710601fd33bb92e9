# SPDX-License-Identifier: Apache-2.0
"""The doctor's engines: their answers are those of plain attention."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from sentencekv_vllm.doctor.finding import State  # noqa: E402
from sentencekv_vllm.doctor.self_test import self_test, start_ours  # noqa: E402
from sentencekv_vllm.doctor.serving import registered, supported  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ours():
    return start_ours()


def test_every_process_knows_the_backend_and_full_equals_plain_attention(ours):
    api = ours["api"]
    findings = [supported(api), registered("API", api), *self_test(ours)]
    assert {f.name: f.state for f in findings} == {f.name: State.OK for f in findings}, findings
    last = findings[-1]
    assert "24 tokens" in last.found and "sparse steps: those of plain attention" in last.found
    assert len({api["pid"], ours["worker"]["pid"]}) == 2, "a worker is no process of the API's"
    assert ours["worker"]["index_bytes"] > 0
