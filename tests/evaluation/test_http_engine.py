# SPDX-License-Identifier: Apache-2.0
"""The engine behind a URL, against a server that stands in for vLLM's."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sentencekv_vllm.evaluation.engine import Request
from sentencekv_vllm.evaluation.http_engine import HttpEngine, ServerRefusal
from sentencekv_vllm.evaluation.server import free_port

SUMMARY = {"mode": "sparse"}


class Handler(BaseHTTPRequestHandler):
    bodies: list[dict] = []
    summary: dict | None = SUMMARY

    def do_GET(self) -> None:
        self._reply(200, {"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        if self.path == "/tokenize":
            self._reply(200, {"tokens": [len(word) for word in body["prompt"].split()]})
        elif body["prompt"] == "bad":
            self._reply(400, {"error": "unknown option"})
        else:
            usage = {"completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 16}}
            reply = {"choices": [{"text": f"to {body['prompt']}"}], "usage": usage}
            self._reply(200, reply | {"kv_transfer_params": {"sentencekv": self.summary}})

    def log_message(self, format: str, *arguments: object) -> None:
        return None

    def _reply(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def url():
    Handler.bodies, Handler.summary = [], SUMMARY
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_replies_come_in_the_order_of_the_requests_with_their_summaries(url):
    prompts = [f"p{i}" for i in range(8)]
    options = {"sentencekv_policy": "random", "sentencekv_token_budget": 256}
    engine = HttpEngine(f"{url}/v1", max_requests=4)
    replies = engine.complete([Request(prompt, 5, options) for prompt in prompts])
    assert [reply.text for reply in replies] == [f"to {prompt}" for prompt in prompts]
    assert {(r.output_tokens, r.cached_tokens, r.summary["mode"]) for r in replies} == {
        (3, 16, "sparse")
    }
    for body in Handler.bodies:
        assert body["vllm_xargs"] == options
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0, 5)


def test_a_text_is_counted_by_the_server_once(url):
    engine = HttpEngine(url, max_requests=1)
    assert [engine.count_tokens("one two three") for _ in range(3)] == [3] * 3
    assert len(Handler.bodies) == 1


def test_what_the_server_refuses_is_passed_on(url):
    with pytest.raises(ServerRefusal, match="answers 400: .*unknown option"):
        HttpEngine(url, 1).complete([Request("bad", 5)])


def test_a_server_without_our_backend_is_pointed_out(url):
    Handler.summary = None
    with pytest.raises(ServerRefusal, match="--attention-backend sentencekv"):
        HttpEngine(url, 1).complete([Request("x", 5)])


def test_distributions_need_an_engine_here(url):
    with pytest.raises(ServerRefusal, match="leave out --kl"):
        HttpEngine(url, 1).complete([Request("x", 5, measured="y")])


def test_a_forced_text_is_sent_as_tokens_and_left_out_of_the_reply(url):
    (reply,) = HttpEngine(url, 1).complete([Request("go on", 5, forced="to go")])
    assert reply.text == " on"
    body = Handler.bodies[-1]
    assert (body["vllm_xargs"], body["max_tokens"]) == ({"force_tokens": [2, 2]}, 7)


def test_a_server_that_does_not_force_is_pointed_out(url):
    with pytest.raises(ServerRefusal, match="--logits-processors .*:ForceTokens"):
        HttpEngine(url, 1).complete([Request("x", 5, forced="from")])


def test_an_address_where_nobody_listens_is_named():
    port = free_port()
    with pytest.raises(ServerRefusal, match=f"no answer from http://127.0.0.1:{port}/v1/models"):
        HttpEngine(f"http://127.0.0.1:{port}", 1)
