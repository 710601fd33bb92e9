# SPDX-License-Identifier: Apache-2.0
"""The served path behind a URL: a running `vllm serve` with our backend."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from .engine import FORCE, Completion, Request

TIMEOUT_SECONDS = 600


class ServerRefusal(RuntimeError):
    """The server cannot be reached or does not take a request; the message says what it said."""


class HttpEngine:
    """An `Engine` over the OpenAI API; requests of a batch are sent at the same time."""

    def __init__(self, url: str, max_requests: int) -> None:
        """Connect.

        Args:
            url: of the server, without the API's path.
            max_requests: most requests at a time.

        Raises:
            ServerRefusal: nobody answers there.
        """
        self._url = url.rstrip("/").removesuffix("/v1")
        self._max_requests = max_requests
        model = self._get("/v1/models")["data"][0]
        self._model = model["id"]
        self.count_tokens = lru_cache(maxsize=1 << 14)(self._count)

    def complete(self, requests: Sequence[Request]) -> Sequence[Completion]:
        with ThreadPoolExecutor(self._max_requests) as pool:
            return list(pool.map(self._one, requests))

    def _one(self, request: Request) -> Completion:
        if request.measured:
            raise ServerRefusal(
                "distributions of forced tokens are not served over HTTP: leave out --kl and long "
                "texts, or leave out --server to use an engine in this process"
            )
        forced = self._tokens(request.forced) if request.forced else []
        body = {
            "model": self._model,
            "prompt": request.prompt,
            "max_tokens": len(forced) + request.max_tokens,
            "temperature": 0,
            "vllm_xargs": {**request.options, **({"force_tokens": forced} if forced else {})},
        }
        reply = self._send("/v1/completions", body)
        text = reply["choices"][0]["text"]
        if not text.startswith(request.forced):
            raise ServerRefusal(
                f"{self._url} does not decode what it is told to: start it with "
                f"--logits-processors {FORCE}:ForceTokens"
            )
        summary = (reply.get("kv_transfer_params") or {}).get("sentencekv")
        if summary is None:
            raise ServerRefusal(
                f"{self._url} answers without a summary of sentencekv: start it with "
                "--attention-backend sentencekv"
            )
        details = reply["usage"].get("prompt_tokens_details") or {}
        return Completion(
            text=text[len(request.forced) :],
            output_tokens=reply["usage"]["completion_tokens"],
            summary=summary,
            cached_tokens=details.get("cached_tokens") or 0,
        )

    def _count(self, text: str) -> int:
        return len(self._tokens(text))

    def _tokens(self, text: str) -> list[int]:
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        return list(self._send("/tokenize", body)["tokens"])

    def _get(self, path: str) -> Any:
        return self._open(urllib.request.Request(f"{self._url}{path}"))

    def _send(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        return self._open(
            urllib.request.Request(f"{self._url}{path}", json.dumps(body).encode(), headers)
        )

    def _open(self, request: urllib.request.Request) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            raise ServerRefusal(f"{request.full_url} answers {error.code}: {said}") from error
        except (urllib.error.URLError, OSError) as error:
            raise ServerRefusal(f"no answer from {request.full_url}: {error}") from error
