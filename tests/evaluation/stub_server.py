# SPDX-License-Identifier: Apache-2.0
"""Stands in for `vllm serve`: health, metrics and completions without a model.

Run as a program, with the arguments that `evaluation.server.Server` gives. `--crash` ends it with a
message, `--deaf` never answers, `--child FILE` starts a process that outlives it and writes its id.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NUM_BLOCKS = 101
COUNTS = {"requests": 0, "running": 0, "tokens": 0}
TEXT = " The answer is 7.</s> and more"
SUMMARY = {"mode": "sparse", "hit_rate": 0.5, "coverage": 0.25}


def metrics() -> str:
    """20 % of 100 blocks at the start of a reply, 5 % from its second quarter on."""
    usage = 0.0
    if COUNTS["running"]:
        usage = 0.2 if COUNTS["tokens"] < COUNTS["running"] / 4 else 0.05
    return "\n".join(
        [
            "# TYPE vllm:kv_cache_usage_perc gauge",
            f'vllm:kv_cache_usage_perc{{engine="0"}} {usage}',
            f'vllm:cache_config_info{{a="x",num_gpu_blocks="{NUM_BLOCKS}"}} 1.0',
            f"vllm:request_decode_time_seconds_count {COUNTS['requests']}",
            f"vllm:request_decode_time_seconds_sum {0.5 * COUNTS['requests']}",
            f"vllm:sentencekv_swap_in_bytes_total {100 * COUNTS['requests']}",
            f"vllm:sentencekv_swap_out_bytes_total {1000 * COUNTS['requests']}",
        ]
    )


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._reply("text/plain", metrics() if self.path == "/metrics" else "")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["ignore_eos"], "every token that is asked for is decoded"
        COUNTS["running"] = body["max_tokens"]
        if body.get("stream"):
            self._stream(body["max_tokens"])
        else:
            reply = self._completion(TEXT) | {"kv_transfer_params": {"sentencekv": SUMMARY}}
            self._reply("application/json", json.dumps(reply))
        COUNTS["requests"] += 1
        COUNTS["running"] = COUNTS["tokens"] = 0

    def log_message(self, format: str, *arguments: object) -> None:
        return None

    def _stream(self, num_tokens: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for _ in range(num_tokens):
            time.sleep(0.01)
            COUNTS["tokens"] += 1
            self.wfile.write(f"data: {json.dumps(self._completion('x'))}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")

    def _reply(self, kind: str, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    @staticmethod
    def _completion(text: str) -> dict:
        choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": None}
        return {
            "id": "1", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--served-model-name")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--crash", action="store_true")
    parser.add_argument("--deaf", action="store_true")
    parser.add_argument("--child")
    options = parser.parse_args()
    print("stub: starting", flush=True)
    if options.crash:
        sys.exit("stub: no such model")
    if options.child:
        sleeper = (
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)"
        )
        child = subprocess.Popen([sys.executable, "-c", sleeper])
        with open(options.child, "w") as file:
            file.write(str(child.pid))
    if options.deaf:
        time.sleep(60)
    ThreadingHTTPServer((options.host, options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
