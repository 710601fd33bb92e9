# SPDX-License-Identifier: Apache-2.0
"""Whatever a client sends, a running server answers it, and its neighbours as if they were alone.

`SENTENCEKV_HTTP_EXAMPLES` sets the number of requests of each test (default 40).
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("openai", reason="the client is not installed")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from test_serve import Server, told  # noqa: E402

from sentencekv_vllm.request_options import KEYS  # noqa: E402

pytestmark = pytest.mark.slow
EXAMPLES = int(os.environ.get("SENTENCEKV_HTTP_EXAMPLES", "40"))
PROMPT = "The fox sees the dog. It runs home at once!\n" * 40

numbers = st.one_of(
    st.integers(-5, 500),
    st.sampled_from([10**30, 10**400, -(10**30), 2**31, 2**63, 1e39, 5e-324, 1e308, -1.0]),
    st.floats(allow_nan=False, allow_infinity=False),
)
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(["on", "off", "full", "blocks", "9" * 5000, "٣", "\0", "x" * 20_000]),
)
plain = st.one_of(numbers, texts)
odd = st.one_of(
    plain, st.none(), st.booleans(), st.lists(plain, max_size=3), st.dictionaries(texts, plain)
)
prompts = st.one_of(
    st.lists(st.integers(0, 499), min_size=1, max_size=600),
    st.sampled_from([[0], [499], [500], [-1], [10**10], [0, 499] * 300, [3] * 2000]),
    st.sampled_from(
        ["!", "!" * 6000, "─│" * 2000, "😀" * 1500, "word " * 1200, "a" * 5000]
        + ["\x00\x01\x02" * 500, "\f\x85\u2028" * 800, "你好。" * 700, "\n" * 3000, " " * 3000]
        + ["مرحبا؟ नमस्ते। " * 150]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=400),
)
bounded = settings(
    max_examples=EXAMPLES, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck)
)
statuses: Counter[int] = Counter()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("fuzz"))
    try:
        running.wait_until_it_answers()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def alone(server):
    """What a neighbour is answered when nobody else is there."""
    return server.complete(PROMPT, max_tokens=24, stop=None).choices[0].text


def post(server, body):
    """Status and answer; a hang is a failure."""
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps({"model": "tiny", "temperature": 0, "max_tokens": 4} | body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as refusal:
        status, text = refusal.code, refusal.read().decode()
    statuses[status] += 1
    return status, text


def check(server, alone, body):
    with ThreadPoolExecutor(1) as pool:
        neighbour = pool.submit(server.complete, PROMPT, max_tokens=24, stop=None)
        status, text = post(server, body)
        assert neighbour.result().choices[0].text == alone
    assert status in (200, 400, 422), text[:2000]
    json.loads(text)
    assert server.process.poll() is None


@bounded
@given(
    xargs=st.dictionaries(
        st.one_of(st.sampled_from(KEYS), texts.map(lambda t: f"sentencekv_{t[:20]}")),
        odd,
        min_size=1,
        max_size=3,
    )
)
def test_any_options_are_answered_and_hurt_nobody(server, alone, xargs):
    check(server, alone, {"prompt": PROMPT, "vllm_xargs": xargs})


@bounded
@given(prompt=prompts)
def test_any_prompt_is_answered_and_hurts_nobody(server, alone, prompt):
    check(server, alone, {"prompt": prompt})


def test_the_server_is_still_well_and_holds_nothing(server, alone):
    answer = server.complete(PROMPT, max_tokens=24, stop=None)
    assert answer.choices[0].text == alone and told(answer)["mode"] == "sparse"
    server.wait_until(
        lambda m: m["num_requests_running"] == 0 and m["sentencekv_host_pages_used"] == 0
    )
    print(dict(statuses))
