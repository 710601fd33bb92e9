# SPDX-License-Identifier: Apache-2.0
"""Several processes share the questions of a run; their records come to one."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from sentencekv_vllm.evaluation.processes import ProcessError, shared

WORK = """
import dataclasses, os

def answer(record, number, send):
    for seed in range(number, 6, 2):
        send(dataclasses.replace(record, seed=seed, text=str(os.getpid())))

def stumble(record, number, send):
    send(record)
    if number:
        raise ValueError("no such model")
    import time; time.sleep(60)

def vanish(record, number, send):
    os._exit(3)

def wait(number, send):
    print(os.getpid(), flush=True)
    import time; time.sleep(600)
"""

KILLED = """
from share_of_a_process import wait
from sentencekv_vllm.evaluation.processes import shared
if __name__ == "__main__":
    list(shared(wait, 2))
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A module that other processes can import."""
    (tmp_path / "share_of_a_process.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)
    import share_of_a_process

    yield share_of_a_process
    del sys.modules["share_of_a_process"]


@pytest.fixture
def partial_of(record):
    from functools import partial

    from sentencekv_vllm.evaluation.variant import Variant

    return lambda function: partial(function, record(0, Variant("sentencekv", 256), 1))


def test_every_share_arrives_once_and_from_its_own_process(work, partial_of):
    records = list(shared(partial_of(work.answer), 2))
    assert sorted(record.seed for record in records) == [*range(6)]
    assert len({record.text for record in records}) == 2


def test_a_failure_ends_all_and_says_why(work, partial_of):
    with pytest.raises(ProcessError, match="ValueError: no such model"):
        list(shared(partial_of(work.stumble), 2))


def test_a_process_that_vanishes_is_noticed(work, partial_of):
    with pytest.raises(ProcessError, match="status 3"):
        list(shared(partial_of(work.vanish), 2))


def test_a_run_that_is_killed_leaves_no_process_behind(work, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-P", script], stdout=subprocess.PIPE, text=True, env=environment
    ) as run:
        engines = [int(run.stdout.readline()) for _ in range(2)]
        run.kill()
    deadline = time.monotonic() + 30
    while any(map(is_running, engines)):
        assert time.monotonic() < deadline, "an engine outlived its run"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
