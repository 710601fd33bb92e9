# SPDX-License-Identifier: Apache-2.0
"""One server as users start it: `vllm serve --config`, real HTTP, processes of its own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

pytest.importorskip("vllm", reason="vLLM is not installed")
openai = pytest.importorskip("openai", reason="the client is not installed")

from engine import MODEL, SETTINGS, environment  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "deploy"))  # its `queries`

from sentencekv_vllm.evaluation.recall_tasks import is_correct, make_prompt  # noqa: E402

pytestmark = pytest.mark.slow
START_S, ANSWER_S = 280, 120


class Server:
    """A running `vllm serve` and a client of it."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        config = folder / "serve.yaml"
        options = {
            "attention-backend": "sentencekv",
            "host": "127.0.0.1",
            "port": self.port,
            "served-model-name": "tiny",
            "block-size": 32,
            "max-model-len": 8192,
            "max-num-seqs": 8,
            "num-gpu-blocks-override": 300,
            "kv-cache-memory-bytes": 1 << 28,
            "enforce-eager": True,
            "additional-config": {"sentencekv": SETTINGS},
        }
        config.write_text(yaml.safe_dump(options))
        self.log = folder / "log"
        command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", MODEL]
        changed = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, "--config", str(config)],
                env=environment() | changed,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd=folder,
            )
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", timeout=ANSWER_S, max_retries=0
        )

    def wait_until_it_answers(self):
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"not up after {START_S} s:\n{self.log.read_text()[-5000:]}")

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
        else:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                return

    def complete(self, prompt, xargs=None, **options):
        body = {} if xargs is None else {"vllm_xargs": xargs}
        return self.client.completions.create(
            model="tiny",
            prompt=prompt,
            temperature=0,
            extra_body=body,
            **({"max_tokens": 40, "stop": ["\n"]} | options),
        )

    def metrics(self):
        """Values by `name` or `name{reason}`."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        values = {}
        for name, labels, value in re.findall(r"^vllm:(\w+)\{(.*?)\} (\S+)$", text, re.M):
            reason = re.search(r'reason="(\w+)"', labels)
            key = f"{name}:{reason[1]}" if reason else name
            values[key] = float(value)
        return values

    def wait_until(self, condition, timeout_s=60):
        deadline = time.monotonic() + timeout_s
        while not condition(values := self.metrics()):
            assert time.monotonic() < deadline, {
                k: v for k, v in values.items() if "sentencekv" in k or "usage" in k or "num_" in k
            }
            time.sleep(0.3)
        return values


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("serve"))
    try:
        running.wait_until_it_answers()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def item():
    """Prompts by task seed; a fact of some words is a token or two each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def make(seed, length=1500):
        return make_prompt(
            "niah_single",
            length,
            seed,
            lambda text: len(tokenizer(text, add_special_tokens=False).input_ids),
        )

    return make


def told(completion):
    return completion.kv_transfer_params["sentencekv"]


def test_answers_are_right_and_say_how_they_were_decoded(server, item):
    before = server.metrics()
    with ThreadPoolExecutor(4) as pool:
        items = [item(seed) for seed in range(6)]
        answers = list(pool.map(lambda x: server.complete(x.prompt), items))
    right = [is_correct(a.choices[0].text, x) for a, x in zip(answers, items, strict=True)]
    assert sum(right) >= 5
    for answer in answers:
        summary = told(answer)
        assert summary["mode"] == "sparse" and summary["sparse_steps"] > 3
        assert summary["blocks_released"] > 0 and summary["sentences"] > 40
        assert summary["hits"] + summary["misses"] > 0 and 0 < summary["coverage"] <= 1
    after = server.wait_until(
        lambda m: (
            m["sentencekv_requests_total:sparse"] >= before["sentencekv_requests_total:sparse"] + 6
        )
    )
    for name in ("hits", "misses", "swap_in_bytes", "swap_out_bytes", "sparse_steps", "attend_ns"):
        key = f"sentencekv_{name}_total"
        assert after[key] > before[key], name
    assert after["sentencekv_host_pages_total"] > 0
    assert after["sentencekv_index_bytes"] > 0


def test_a_request_chooses_its_own_policy_budget_or_none(server, item):
    prompt = item(20).prompt
    full = server.complete(prompt, {"sentencekv_policy": "full"})
    off = server.complete(prompt, {"sentencekv": "off"})
    assert told(full)["mode"] == "policy_full" and told(off)["mode"] == "switched_off"
    assert full.choices[0].text == off.choices[0].text
    for budget, blocks in ((192, 3), ("320", 7)):  # some clients send strings only
        summary = told(server.complete(prompt, {"sentencekv_token_budget": budget}))
        head_blocks = blocks * 4 * 2  # layers, KV heads
        steps = (summary["hits"] + summary["misses"]) / head_blocks
        # The last step's counts arrive when the answer has gone.
        assert steps in (summary["sparse_steps"], summary["sparse_steps"] - 1)


@pytest.mark.parametrize(
    ("xargs", "message"),
    [
        ({"sentencekv_polcy": "full"}, "did you mean 'sentencekv_policy'"),
        ({"sentencekv_policy": "h2o"}, "'h2o' is not known"),
        ({"sentencekv_token_budget": 20}, "the smallest budget is 128"),
        ({"sentencekv_token_budget": 100000}, "the largest budget is 416"),
        ({"sentencekv": "maybe"}, '"on" or "off"'),
        ({"sentencekv_retention": 1e39}, "at most 10000, got 1e+39"),
        ({"sentencekv_index": ["bounds"]}, "['bounds'] is not known"),
        ({"sentencekv_token_budget": "9" * 5000}, "whole number of tokens"),
        ({"sentencekv_token_budget": 10**15}, "at most 16777216"),
        ({"sentencekv_policy": "\u2028\x00x" * 50}, "is not known"),
    ],
)
def test_a_bad_option_is_that_clients_error_alone(server, item, xargs, message):
    good, bad = item(30), item(31)
    undisturbed = server.complete(good.prompt).choices[0].text
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(server.complete, good.prompt)
        with pytest.raises(openai.BadRequestError) as refusal:
            server.complete(bad.prompt, xargs)
        assert other.result().choices[0].text == undisturbed
    assert refusal.value.status_code == 400
    assert message in str(refusal.value)


def test_a_stream_says_the_same_as_an_answer_in_one_piece(server, item):
    prompt = item(40).prompt
    whole = server.complete(prompt).choices[0].text
    pieces = [chunk.choices[0].text for chunk in server.complete(prompt, stream=True)]
    assert len(pieces) > 3 and "".join(pieces) == whole


def test_a_client_that_hangs_up_leaves_nothing_behind(server, item):
    for seed in range(3):
        stream = server.complete(item(50 + seed).prompt, stream=True, max_tokens=4000, stop=None)
        for _ in range(2):
            next(stream)
        stream.close()
    server.wait_until(
        lambda m: (
            m["num_requests_running"] == m["num_requests_waiting"] == 0
            and m["kv_cache_usage_perc"] == 0
        )
    )
    # Of an idle engine: no other request has to come for the levels to fall.
    server.wait_until(
        lambda m: (
            m["sentencekv_host_pages_used"] == 0
            and m["sentencekv_sparse_requests"] == 0
            and m["sentencekv_resident_blocks"] == 0
        )
    )


def test_a_prompt_that_can_never_fit_is_refused_with_the_numbers(server, item):
    with pytest.raises(openai.BadRequestError, match="8192"):
        server.complete([5] * 9000, max_tokens=4)
    assert server.complete(item(60).prompt, max_tokens=4).choices[0].text


def test_every_query_of_dashboard_and_rules_finds_a_series(server, item):
    pytest.importorskip("promql_parser", reason="promql-parser is not installed")
    from prometheus_client.parser import text_string_to_metric_families
    from queries import queries, series

    server.complete(item(65).prompt)
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [(s.name, s.labels) for family in families for s in family.samples]
    # Its labels come with the first prompt that is segmented, and this server ranks blocks.
    unlabelled = {f"{family.name}_total" for family in families if not family.samples}
    assert unlabelled & {"vllm:sentencekv_segmented_total"} == unlabelled & {
        name for query in queries().values() for name in {s.name for s in series(query)}
    }
    for where, query in queries().items():
        for wanted in series(query):
            if wanted.name.startswith("vllm:") and wanted.name not in unlabelled:
                assert any(wanted.takes(*sample) for sample in samples), (where, wanted)


def test_the_server_is_still_well(server, item):
    one = item(70)
    assert is_correct(server.complete(one.prompt).choices[0].text, one)
    assert server.process.poll() is None
