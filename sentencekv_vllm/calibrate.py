# SPDX-License-Identifier: Apache-2.0
"""`sentencekv calibrate MODEL --text FILE`: find the basis of keys with a text of your own.

A server finds the basis by itself when it starts for the first time, with a text that comes with
the package. This command does the same with another text, and later starts take its file. Give it
what the server gets: dtype, block size, tensor-parallel size and quantisation belong to the file.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cli.complaint import FAILED, MISUSED, complain
from .cli.parser import Parser
from .ops.basis_file import USER_TEXT, BasisFileError, basis_folder, read_basis, text_digest

COMMAND = "sentencekv calibrate"
LEAST_TOKENS = 512
ENGINE = {
    "max_num_seqs": 1,
    "enforce_eager": True,
    "attention_backend": "sentencekv",
    "max_model_len": 2048,  # of requests, which there are none of; texts have all positions
    "kv_cache_memory_bytes": 2 << 30,  # where a server would take most of the memory
}
SETTINGS = {"policy": "sentencekv", "min_context_tokens": 1, "host_pool_gib": 0.25}


def parser() -> Parser:
    """The command line."""
    found = Parser(prog=COMMAND, description=(__doc__ or "").partition("\n\n")[2])
    found.add_argument("model", help="as `vllm serve` takes it")
    found.add_argument(
        "--text", type=Path, required=True, help="a file in UTF-8, like your prompts"
    )
    found.add_argument("--tokens", type=int, default=8192, help="of it, at most")
    found.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="workers")
    found.add_argument("--dtype", default="auto", help="of weights and KV")
    found.add_argument(
        "--block-size", type=int, metavar="TOKENS", help="of a KV block; default: vLLM's"
    )
    found.add_argument(
        "--engine",
        type=json.loads,
        default={},
        metavar="JSON",
        help='further arguments of vllm.LLM, for example \'{"quantization": "fp8"}\'',
    )
    return found


def engine_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `vllm.LLM`."""
    calibration = {"text": str(options.text.resolve()), "tokens": options.tokens}
    found: dict[str, Any] = {
        **ENGINE,
        "model": options.model,
        "tensor_parallel_size": options.tensor_parallel_size,
        "dtype": options.dtype,
        **options.engine,
    }
    if options.block_size is not None:
        found["block_size"] = options.block_size
    found["additional_config"] = {"sentencekv": SETTINGS, "sentencekv_calibration": calibration}
    return found


def check(options: argparse.Namespace) -> str:
    """The text.

    Raises:
        ValueError: an option breaks a rule.
    """
    if options.tokens < LEAST_TOKENS:
        raise ValueError(
            f"--tokens must be at least {LEAST_TOKENS}, got {options.tokens}: raise it, or leave "
            "it away"
        )
    if not isinstance(options.engine, dict):
        raise ValueError(
            f"--engine must be a JSON object of arguments of vllm.LLM, got {options.engine!r}"
        )
    try:
        text: str = options.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--text must be in UTF-8, {options.text} is not (byte {error.start}): convert it"
        ) from error
    except OSError as error:
        raise ValueError(
            f"--text must name a file that can be read, got {options.text}: {error.strerror}"
        ) from error
    if len(text) < LEAST_TOKENS:
        raise ValueError(
            f"--text must hold at least {LEAST_TOKENS} tokens, {options.text} has {len(text)} "
            "characters: give a longer text"
        )
    return text


def files_of(source: str) -> dict[Path, int]:
    """Files made with a text, and when."""
    found = {}
    for path in sorted(basis_folder().glob("*.basis")):
        try:
            if read_basis(path).source == source:
                found[path] = path.stat().st_mtime_ns
        except (BasisFileError, FileNotFoundError):
            continue
    return found


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit status."""
    options = parser().parse_args(arguments)
    try:
        source = USER_TEXT + text_digest(check(options))
        before = files_of(source)
    except (ValueError, OSError, RuntimeError) as error:
        complain(COMMAND, str(error))
        return MISUSED
    if options.tensor_parallel_size == 1:  # what goes wrong is raised here, not in another process
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    try:
        LLM(**engine_arguments(options))
    except Exception as error:  # the engine's, of any kind
        complain(COMMAND, str(error))
        return FAILED
    written = [path for path, when in files_of(source).items() if before.get(path) != when]
    if len(written) != options.tensor_parallel_size:
        complain(
            COMMAND,
            f"{len(written)} of {options.tensor_parallel_size} files could be written to "
            f"{basis_folder()}: see the warnings above",
        )
        return FAILED
    for path in written:
        print(f"{path}: {read_basis(path).tokens} tokens counted")
    return 0
