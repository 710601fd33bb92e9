# SPDX-License-Identifier: Apache-2.0
"""Our server process: awaited, stopped with all it started, and its log on failure."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from sentencekv_vllm.evaluation.prometheus import Metrics
from sentencekv_vllm.evaluation.served import Client
from sentencekv_vllm.evaluation.server import Server, ServerError

STUB = (sys.executable, str(Path(__file__).with_name("stub_server.py")))


def stub(folder: Path, *arguments: str) -> Server:
    return Server(Path("some/model"), arguments, folder / "server.log", command=STUB)


def is_running(pid: int) -> bool:
    """False for a process that has ended, whether its parent has noticed or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid: int) -> bool:
    """A killed process ends when the kernel gets to it."""
    deadline = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_running(pid)


def test_leaving_stops_the_server_and_children_that_ignore_its_end(tmp_path):
    pid_file = tmp_path / "child"
    with stub(tmp_path, "--child", str(pid_file)) as server:
        server.wait_ready(20)
        child = int(pid_file.read_text())
        assert is_running(child)
    assert ends(child)


def test_an_error_inside_stops_the_server_too(tmp_path):
    pid_file = tmp_path / "child"
    with (
        pytest.raises(KeyboardInterrupt),
        stub(tmp_path, "--child", str(pid_file)) as server,
    ):
        server.wait_ready(20)
        raise KeyboardInterrupt
    assert ends(int(pid_file.read_text()))


def test_a_server_that_ends_early_is_reported_at_once_with_its_log(tmp_path):
    with (
        pytest.raises(ServerError, match="(?s)ended with status 1 .*stub: no such model"),
        stub(tmp_path, "--crash") as server,
    ):
        server.wait_ready(60)


def test_a_server_that_never_answers_is_given_up_with_its_log(tmp_path):
    with (
        pytest.raises(ServerError, match="(?s)not ready after 1 s.*stub: starting"),
        stub(tmp_path, "--deaf") as server,
    ):
        server.wait_ready(1)


def test_servers_have_ports_of_their_own(tmp_path):
    assert len({stub(tmp_path).port for _ in range(5)}) > 1


def test_the_environment_leaves_the_cores_to_the_operating_system(tmp_path):
    with stub(tmp_path) as server:
        server.wait_ready(20)
        assert server._process is not None
        environment = Path(f"/proc/{server._process.pid}/environ").read_bytes()
    assert b"VLLM_CPU_OMP_THREADS_BIND=nobind" in environment


def test_a_reply_is_the_answer_and_what_the_metrics_gained(tmp_path):
    pytest.importorskip("openai", reason="the openai client is not installed")
    with stub(tmp_path) as server:
        server.wait_ready(20)
        client = Client(server, end_of_text="</s>")
        for _ in range(2):
            reply = client.ask("?", num_tokens=11)
            assert reply.text == " The answer is 7."
            assert reply.seconds_per_token == pytest.approx(0.05)
            assert (reply.swapped_in_bytes, reply.swapped_out_bytes) == (100, 1000)
            assert reply.summary["hit_rate"] == 0.5


def test_blocks_held_are_those_of_the_later_half_of_the_decode(tmp_path):
    pytest.importorskip("openai", reason="the openai client is not installed")
    with stub(tmp_path) as server:
        server.wait_ready(20)
        assert Client(server, end_of_text="</s>").blocks_held("?", num_tokens=60) == 5


def test_metrics_add_up_over_labels_and_skip_comments():
    text = '# HELP a b\na{x="1"} 2\na{x="2",y="{\\"}"} 3.5\nab 7\nb_total 1e3\n'
    metrics = Metrics(text)
    assert metrics.value("a") == 5.5
    assert metrics.value("b_total") == 1000
    assert metrics.value("absent") == 0
    assert metrics.label("a", "x") == "1"
    with pytest.raises(KeyError, match="absent"):
        metrics.label("absent", "x")
