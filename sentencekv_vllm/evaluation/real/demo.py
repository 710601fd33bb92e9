# SPDX-License-Identifier: Apache-2.0
"""`make demo MODEL=NAME`: a real model answers questions about a real document, twice.

One server with sentencekv, one with stock attention, equal flags otherwise. All questions are
about the same document: the first is prefilled, the prefix cache serves the others. What a small
model gets wrong by itself is shown, not judged: the exit status is 0 if KV blocks were released.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..served import Client, Reply
from ..server import Server, ServerError
from .chat import Chat, chat_of
from .files import RealTextError
from .functions import functions
from .maker import BREAK, Maker, Turn
from .models import MODELS, ModelError, full_name, get_model
from .needles import needle
from .prose import prose
from .quotes import quotable, quote
from .side_by_side import Asked, about, report

REPLY_TOKENS = 96  # decoded whatever the model says: the clock needs them
MEMORY_TOKENS = 160
SHARE_ATTENDED = 8  # a budget of an eighth of the prompt
READY_SECONDS = 600  # the first start on a machine builds the C++ ops
ANSWER_SECONDS = 900
HEAD = "Read the following document and answer my question about it.\n\n"
SUMMARY = Turn("\n\nWhat is this document about? Answer in one sentence.", "", (), REPLY_TOKENS)


def model_folder(name: str) -> Path:
    """A folder as it is; one of `MODELS`, or the start of its name, made where it is missing.

    Raises:
        ModelError: neither, or it cannot be had.
    """
    if Path(name).is_dir():
        return Path(name).resolve()
    if full_name(name) not in MODELS:
        raise ModelError(f"{name!r} is no folder and none of {', '.join(MODELS)}")
    return get_model(full_name(name))


def arguments(tokens: int, ours: bool) -> list[str]:
    """Of `vllm serve`, for prompts of so many tokens."""
    import torch

    settings: dict[str, Any] = {
        "block-size": 32,
        "max-model-len": tokens + max(REPLY_TOKENS, MEMORY_TOKENS) + 32,
        "max-num-seqs": 2,
        "kv-cache-memory-bytes": 1 << 30,
    }
    if not torch.cuda.is_available():
        settings["dtype"] = "float32"  # what every CPU multiplies fast
    if ours:
        settings["attention-backend"] = "sentencekv"
        config = {
            "token_budget": max(256, tokens // SHARE_ATTENDED // 32 * 32),
            "min_context_tokens": 512,
            "host_pool_gib": 1,
        }
        settings["additional-config"] = json.dumps({"sentencekv": config})
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [*flags, "--enforce-eager"]  # compiling would take longer than the rest of the demo


def questions(chat: Chat, tokens: int, seed: int) -> tuple[str, list[Turn]]:
    """A document with a needle, and what is asked about it.

    Raises:
        RealTextError: the machine has too little text, or the prompt is too short.
    """
    maker = Maker(chat, tokens, chat.count, lambda: prose(None), lambda: functions(None))
    rng = random.Random(f"demo/{tokens}/{seed}")
    planted, number = needle(rng)
    room = maker.room(HEAD, number) - REPLY_TOKENS
    for _ in range(50):
        document = maker.haystack(rng, [planted], room)
        paragraphs = [text for text in document.split(BREAK) if planted not in text]
        if len(fit := quotable(paragraphs, maker)) >= 2:
            quotes = [quote(text, maker) for text in rng.sample(fit, 2)]
            return document, [number, *quotes, SUMMARY]
    raise RealTextError(f"no document of {tokens} tokens has paragraphs to quote: ask for longer")


def ask(chat: Chat, document: str, turns: list[Turn], sides: list[Client]) -> Iterator[Asked]:
    """Each question to each server in turn."""
    for turn in turns:
        prompt = chat.open(f"{HEAD}{document}{turn.ask}") + turn.prefix
        replies: list[Reply] = [side.ask(prompt, REPLY_TOKENS) for side in sides]
        yield Asked(turn, *replies)


def run(name: str, tokens: int, seed: int = 0) -> int:
    """Serve, ask, print; the exit status."""
    try:
        folder = model_folder(name)
        chat = chat_of(str(folder))
        document, turns = questions(chat, tokens, seed)
        with tempfile.TemporaryDirectory() as logs, ExitStack() as stack:
            print(f"Starting two servers of {folder.name}: sentencekv, and stock attention ...")
            servers = [
                stack.enter_context(
                    Server(folder, arguments(tokens, ours), Path(logs, f"{ours}.log"))
                )
                for ours in (True, False)
            ]
            for server in servers:
                server.wait_ready(READY_SECONDS)
            sides = [Client(server, chat.end, ANSWER_SECONDS) for server in servers]
            print(about(document, chat.count(document)))
            asked = []
            for question in ask(chat, document, turns, sides):
                print(question, flush=True)
                asked.append(question)
            prompt = chat.open(f"{HEAD}{document}\n\nTell me more about it.")
            blocks = [side.blocks_held(prompt, MEMORY_TOKENS) for side in sides]
    except (ModelError, RealTextError, ServerError) as error:
        print(error, file=sys.stderr)
        return 1
    print(report(asked, *blocks))
    return 0 if blocks[0] < blocks[1] else 1
