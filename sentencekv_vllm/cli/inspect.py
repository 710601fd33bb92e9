# SPDX-License-Identifier: Apache-2.0
"""`sentencekv inspect`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .complaint import FAILED, MISUSED, complain

COMMAND = "sentencekv inspect"
TOLD = 5  # sentences
WIDTH = 90  # characters of them


def inspect(
    model: Annotated[str, typer.Argument(help="A folder, or a name as vLLM takes it.")],
    prompt: Annotated[Path | None, typer.Option(help="A file in UTF-8: the text to read.")] = None,
    text: Annotated[str | None, typer.Option(help="The text itself, in place of a file.")] = None,
    question: Annotated[
        str,
        typer.Option(
            help="Asked below the text in the model's chat template; without it the text is the "
            "whole prompt, as it is.",
        ),
    ] = "",
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("page.html"),
    max_tokens: Annotated[int, typer.Option(min=2, help="Of the answer.")] = 64,
    budget: Annotated[int, typer.Option(min=1, help="Tokens read a step.")] = 512,
    policy: Annotated[str, typer.Option(help="One that ranks while it decodes.")] = "sentencekv",
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a KV block.")] = 32,
    dtype: Annotated[str, typer.Option(help="Of weights and KV: auto, float32, ...")] = "auto",
    kv_cache_gib: Annotated[float, typer.Option(min=0.01, help="KV memory.")] = 1.0,
    host_pool_gib: Annotated[float, typer.Option(min=0.01, help="The swap pool.")] = 1.0,
) -> int:
    """Show what a model looked at while it answered, as one HTML page.

    Starts an engine in this process and asks once, greedily. The page holds the text and needs no
    network: sentences coloured by how often they were selected, by layer, head and token.
    """
    if (prompt is None) == (text is None):
        complain(COMMAND, "a text is needed, once: give either --prompt FILE or --text TEXT")
        return MISUSED
    try:
        given = text if prompt is None else prompt.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        complain(COMMAND, f"--prompt must name a file in UTF-8, got {prompt}: {error}")
        return MISUSED
    if not out.parent.is_dir():
        complain(COMMAND, f"--out must lie in a folder that exists, got {out}: make {out.parent}")
        return MISUSED
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # before vLLM is imported
    from ..config import ConfigError
    from ..inspection.error import InspectError
    from ..inspection.inquiry import Inquiry, ask
    from ..inspection.page import render

    inquiry = Inquiry(
        model=model,
        text=given or "",
        question=question,
        max_tokens=max_tokens,
        budget=budget,
        policy=policy,
        block_size=block_size,
        dtype=dtype,
        kv_cache_gib=kv_cache_gib,
        host_pool_gib=host_pool_gib,
    )
    try:
        answer, trace = ask(inquiry)
    except ConfigError as error:
        complain(COMMAND, str(error))
        return MISUSED
    except InspectError as error:
        complain(COMMAND, str(error))
        return FAILED
    except Exception as error:  # the engine's, of any kind
        complain(COMMAND, _reason(error))
        return FAILED
    out.write_text(render(answer, trace), encoding="utf-8")
    print(f"Answer: {''.join(answer.tokens).strip()}\n\nSelected most, of layers, heads and steps:")
    shares = trace.sentence_shares(answer.ends)
    for i in shares.argsort()[::-1][:TOLD]:
        print(f"{shares[i]:7.1%}  {' '.join(answer.sentences[i].split())[:WIDTH]}")
    print(f"\n{trace.num_hits} hits, {trace.num_misses} misses; {len(trace.lengths)} steps: {out}")
    return 0


def _reason(error: Exception) -> str:
    """In our words, where vLLM's configuration has wrapped them."""
    wrapped = str(error).partition("Value error, ")[2].partition(" [type=")[0]
    return wrapped or f"{type(error).__name__}: {error}"
