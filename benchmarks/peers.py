# SPDX-License-Identifier: Apache-2.0
"""kvpress on the questions of `sentencekv eval`, into the same results and tables.

    python -m venv peers                  # kvpress and vLLM want different transformers
    peers/bin/pip install torch==2.13.0 'sentencekv-vllm[peers]'
    peers/bin/python -P benchmarks/peers.py --preset headline --items 100

Options are those of `sentencekv eval`; tasks with two requests and policies are left out. Seeds,
prompts and budgets are the same: a press keeps `budget` tokens of the prompt per KV head.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sentencekv_vllm.evaluation import engine_setup
from sentencekv_vllm.evaluation.command import questions, write_summary
from sentencekv_vllm.evaluation.items import Problem
from sentencekv_vllm.evaluation.kvpress_peer import PRESSES, VERSIONS, KVPressPeer, PeerReply
from sentencekv_vllm.evaluation.options import parse
from sentencekv_vllm.evaluation.processes import Send, shared
from sentencekv_vllm.evaluation.progress import Progress
from sentencekv_vllm.evaluation.recall_tasks import MULTI_TURN, first_line
from sentencekv_vllm.evaluation.records import Key, Record, Results
from sentencekv_vllm.evaluation.variant import DENSE, Variant, make_variants

WITH = f"kvpress {VERSIONS['kvpress']}"


def peer_variants(names: Sequence[str], budgets: Sequence[int]) -> list[Variant]:
    """Every press at every budget, and the whole cache."""
    presses = [Variant(name, budget, WITH) for name in names for budget in budgets]
    return [Variant(DENSE, None, WITH), *presses]


def asked(options: argparse.Namespace) -> list[Problem]:
    """Without what takes two requests or has no answer."""
    return [p for p in questions(options) if p.cell.task != MULTI_TURN and not p.cell.is_text]


def share(
    options: argparse.Namespace,
    names: Sequence[str],
    known: set[Key],
    deadline: float | None,
    number: int,
    send: Send,
) -> None:
    """What one process answers."""
    peer = KVPressPeer(Path(options.model))
    for problem in asked(options):
        if problem.seed % options.processes != number:
            continue
        if deadline and time.time() > deadline:
            return
        wanted = [
            v
            for v in peer_variants(names, options.budgets)
            if (problem.cell, problem.seed, v) not in known
        ]
        if not wanted:
            continue
        item = problem.make(peer.count_tokens)
        replies = peer.answer(item, options.budgets, names)
        tokens = peer.count_tokens(item.prompt) + 1
        for variant in wanted:
            reply = replies[variant.name, variant.budget]
            score = item.metric(reply.text, item.references)
            send(record(problem, variant, reply, score, item.references[0], item.depth, tokens))


def record(
    problem: Problem,
    variant: Variant,
    reply: PeerReply,
    score: float,
    target: str,
    depth: float | None,
    prompt_tokens: int,
) -> Record:
    """A press swaps nothing and estimates nothing."""
    return Record(
        task=problem.cell.task,
        style=problem.cell.style,
        tokens=problem.cell.tokens,
        seed=problem.seed,
        variant=variant.name,
        budget=variant.budget,
        server=variant.server,
        score=score,
        text=first_line(reply.text),
        target=target,
        depth=depth,
        kl=None,
        output_tokens=reply.output_tokens,
        cached_tokens=0,
        mode=f"kept {reply.kept_tokens:.1f}",
        sparse_steps=reply.output_tokens - 1,
        sentences=0,
        prompt_tokens=prompt_tokens,
        hits=0,
        misses=0,
        coverage=None,
    )


def main(arguments: Sequence[str]) -> int:
    """Run it; the exit status."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--presses", default=",".join(PRESSES))
    chosen, rest = parser.parse_known_args(arguments)
    names = chosen.presses.split(",")
    unknown = [name for name in names if name not in PRESSES]
    if unknown:
        print(f"no press {unknown[0]!r}: use {', '.join(PRESSES)}", file=sys.stderr)
        return 2
    options = parse(rest, (__doc__ or "").partition("\n")[0])
    print(", ".join(f"{name} {number}" for name, number in VERSIONS.items()), file=sys.stderr)
    results = Results(options.out / "results.jsonl", engine_setup.identity(options))
    problems, peers = asked(options), peer_variants(names, options.budgets)
    known = set(results.records)
    missing = sum((p.cell, p.seed, v) not in known for p in problems for v in peers)
    if missing:
        deadline = time.time() + 60 * options.minutes if options.minutes else None
        progress = Progress(missing)
        work = partial(share, options, names, known, deadline)
        for found in shared(work, options.processes):
            results.add(found)
            progress()
    ours = make_variants(options.policies, options.budgets)
    answered = {variant for _, _, variant in results.records}
    write_summary(options, results, problems, [*(v for v in ours if v in answered), *peers])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
