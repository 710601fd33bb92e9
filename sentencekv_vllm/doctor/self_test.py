# SPDX-License-Identifier: Apache-2.0
"""One prompt, answered by an engine with our backend and by one with vLLM's own."""

from __future__ import annotations

from typing import Any

from .finding import Finding, State
from .serving import SELF_TEST, ProbeError, probe, registered

NAME = "self test"


def skipped() -> list[Finding]:
    """What only a running engine can tell."""
    note = "without the self test no engine is started"
    names = ("backend in the engine process", "backend in the worker process", "runs here", NAME)
    return [Finding(name, State.UNKNOWN, note) for name in names]


def start_engines() -> dict[str, Any]:
    """Answer of an engine with our backend and what its processes say; under `stock` that of
    vLLM's own, or its error.

    Raises:
        ProbeError: ours did not start, or did not answer.
    """
    return probe(SELF_TEST)


def broken(error: ProbeError) -> Finding:
    fix = f"python -P -m {SELF_TEST} answer.json shows the whole log"
    return Finding(NAME, State.BROKEN, f"no engine with our backend: {error}", fix)


def self_test(answers: dict[str, Any]) -> list[Finding]:
    """What the answers say."""
    findings = [*processes(answers), runs_here(answers["worker"])]
    stock = answers["stock"]
    if "error" in stock:
        found = f"no engine with vLLM's own backend: {stock['error']}"
        return [*findings, Finding(NAME, State.UNKNOWN, found)]
    return [*findings, compared(answers, stock)]


def processes(ours: dict[str, Any]) -> list[Finding]:
    """Engine and worker: the one has answered through our connector, the other was asked."""
    worker = ours["worker"]
    if not ours["summary"]:
        fix = "start the server with --attention-backend sentencekv"
        engine = Finding("backend in the engine process", State.BROKEN, "it booked nothing", fix)
    else:
        engine = registered("engine", {"backend": True, "connector": True, "plugins": None},
                            ": its scheduler has booked the request")  # fmt: skip
    alone = worker["parent"] != ours["api"]["pid"]
    note = ", a child of the engine's" if alone else ", which is the engine's"
    return [engine, registered("worker", worker, note)]


def runs_here(worker: dict[str, Any]) -> Finding:
    """Device, runner, ops and the backend of dense rows."""
    slow = worker["ops"] == "reference"
    fix = "see C++ kernels" if slow else ""
    found = (
        f"{worker['device']}, {worker['runner']} model runner; sparse rows: {worker['ops']} ops, "
        f"dense rows: {worker['dense']}"
    )
    return Finding("runs here", State.WARNING if slow else State.OK, found, fix)


def compared(ours: dict[str, Any], stock: dict[str, Any]) -> Finding:
    """Tokens, where everything is selected but read through the sparse path."""
    steps = (ours["summary"] or {}).get("sparse_steps", 0)
    mine, theirs = ours["tokens"], stock["tokens"]
    same = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
    fix = "please report it, with the output of sentencekv doctor --json"
    if not steps:
        return Finding(NAME, State.BROKEN, f"no sparse step: {ours['summary']}", fix)
    if same is not None or len(mine) != len(theirs):
        found = f"policy full and plain attention differ at token {same} of {len(theirs)}"
        return Finding(NAME, State.BROKEN, found, fix)
    return Finding(
        NAME,
        State.OK,
        f"{len(mine)} tokens after a prompt of {ours['prompt_tokens']}, {steps} sparse steps: "
        "those of plain attention",
    )
