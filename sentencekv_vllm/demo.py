# SPDX-License-Identifier: Apache-2.0
"""`make demo`: needles in long haystacks, served with sentencekv and with stock attention.

Starts two vLLM servers with the embedded tiny-recall model and equal flags, asks both the same
questions over the OpenAI API, and prints answers, memory, swap traffic and time per token.
The exit status is 0 if every sentencekv answer is right and KV blocks were released.
`make demo MODEL=smollm2`, or another model's folder: `evaluation.real.demo`.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from .cli.complaint import FAILED, complain
from .cli.parser import Parser
from .evaluation.comparison import HEADER, Question, Round, report, row, succeeded
from .evaluation.real import demo as real
from .evaluation.recall_tasks import make_prompt
from .evaluation.served import Client
from .evaluation.server import Server, ServerError
from .presets import PACKAGE, preset_path

MODEL = PACKAGE / "assets" / "tiny-recall"
END_OF_TEXT = "</s>"
PRESET = "ci_tiny"
LENGTHS = (8192, 16000)  # prompt tokens
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NUM_TOKENS = 64  # of a reply: the answer, then whatever comes, to have something to time
MEMORY_TOKENS = 256  # of the reply during which the block pool is watched
READY_SECONDS = 300  # 25 on two idle cores; the first start on a machine builds the C++ ops, too
OURS = ("attention-backend", "additional-config")  # what a preset says to sentencekv only
COMMON = {
    "enforce-eager": True,  # compiling would take longer than the rest of the demo
    "kv-cache-memory-bytes": 128 << 20,
    "max-model-len": max(LENGTHS) + 512,
    "max-num-seqs": 4,
}


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as arguments of `vllm serve`; True is a flag without a value."""
    arguments = []
    for name, value in settings.items():
        arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return arguments


def start(logs: Path, stack: ExitStack) -> tuple[Client, Client]:
    """Both servers, ready: sentencekv with the preset, and stock attention with its other flags.

    Raises:
        ServerError: one of them did not start.
    """
    preset = yaml.safe_load(preset_path(PRESET).read_text())
    shared = {name: value for name, value in preset.items() if name not in OURS}
    common = flags(COMMON)
    arguments = {
        "sentencekv": ["--config", str(preset_path(PRESET)), *common],
        "stock": [*flags(shared), *common],
    }
    servers = [
        stack.enter_context(Server(MODEL, values, logs / f"{name}.log"))
        for name, values in arguments.items()
    ]
    for server in servers:
        server.wait_ready(READY_SECONDS)
    ours, stock = (Client(server, END_OF_TEXT) for server in servers)
    return ours, stock


def token_counter() -> Callable[[str], int]:
    """Length of a text in the model's tokens, without the begin-of-text token."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def ask_all(
    ours: Client, stock: Client, lengths: Sequence[int], depths: Sequence[float]
) -> list[Round]:
    """Every question to both servers in turn, and one look at the memory at each length."""
    count = token_counter()
    rounds = []
    print(HEADER)
    for length in lengths:
        questions = []
        for seed, depth in enumerate(depths):
            item = make_prompt("niah_single", length - 1, seed, count, depth=depth)
            question = Question(
                tokens=1 + count(item.prompt),
                depth=depth,
                item=item,
                ours=ours.ask(item.prompt, NUM_TOKENS),
                stock=stock.ask(item.prompt, NUM_TOKENS),
            )
            print(row(question), flush=True)
            questions.append(question)
        # A text of its own: of one that is in the prefix cache, the decode starts at once, and
        # the first steps are dense until the sentences are known.
        prompt = make_prompt("niah_single", length - 1, len(depths), count).prompt
        held = [client.blocks_held(prompt, MEMORY_TOKENS) for client in (ours, stock)]
        rounds.append(Round(questions, *held))
    return rounds


def _end_on_sigterm() -> None:
    """Without a handler a terminated demo would leave its servers behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def parser() -> Parser:
    """The command line."""
    found = Parser(
        prog="sentencekv demo",
        description="Ask two servers of a small model, sentencekv and stock attention, for "
        "needles in long texts.",
    )
    found.add_argument(
        "--lengths", type=int, nargs="+", default=LENGTHS, metavar="TOKENS", help="of the prompts"
    )
    found.add_argument(
        "--depths",
        type=float,
        nargs="+",
        default=DEPTHS,
        metavar="SHARE",
        help="where the needles are: 0 is the beginning of a text, 1 its end",
    )
    found.add_argument("--model", help="a real one: a folder, smollm2, qwen or gemma3")
    found.add_argument("--tokens", type=int, default=2048, help="of its prompts")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status."""
    line = parser()
    options = line.parse_args(arguments)
    if options.model:
        _end_on_sigterm()
        return real.run(options.model, options.tokens)
    longest = max(options.lengths)
    if longest > max(LENGTHS):
        line.error(f"the servers take prompts of at most {max(LENGTHS)} tokens, got {longest}")
    _end_on_sigterm()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        print(f"Starting two servers of {MODEL.name}: preset {PRESET}, and stock attention ...")
        try:
            ours, stock = start(Path(folder), stack)
        except ServerError as error:
            complain(line.prog, str(error))
            return FAILED
        print(f"ready after {time.monotonic() - started:.0f} s\n")
        try:
            rounds = ask_all(ours, stock, options.lengths, options.depths)
        except Exception:
            for client in (ours, stock):
                print(f"The end of a server's log:\n{client.server.log_tail()}", file=sys.stderr)
            raise
    print(report(rounds))
    return 0 if succeeded(rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
