# SPDX-License-Identifier: Apache-2.0
"""How much of the attention a served decode step reads, on a real model, and which lookups.

For every sparse step, layer and KV head: the true share of the attention on what is read, the
index's own estimate of it (`coverage`), and of the history tokens with more than a fifth of a
head group's attention the share whose block is selected. Keys are those of the served pages.

    python -P benchmarks/attention_held.py FOLDER/qwen-0.5b --tokens 4096 --budgets 160 256 512
"""

from __future__ import annotations

import argparse

from sentencekv_vllm.evaluation.attention_held import watching
from sentencekv_vllm.evaluation.engine import Request, VllmEngine
from sentencekv_vllm.evaluation.real.tasks import QUESTIONS, Sources, real_problems

TASKS = ("niah_multikey", "niah_multivalue", "niah_multiquery", "variable_tracking", "repeat_code")
SINKS, RECENT = 32, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="folder or name")
    parser.add_argument("--tokens", type=int, default=4096, help="of a prompt")
    parser.add_argument("--budgets", type=int, nargs="+", default=[160, 256, 512])
    parser.add_argument("--tasks", nargs="+", default=TASKS, help=", ".join(QUESTIONS))
    parser.add_argument("--items", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--answer-tokens", type=int, default=24)
    parser.add_argument("--retention", type=float, default=2.0)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--text-folder")
    parser.add_argument("--code-folder")
    args = parser.parse_args()
    engine = VllmEngine(
        args.model,
        {
            "token_budget": max(args.budgets),
            "num_sink_tokens": SINKS,
            "recent_window": RECENT,
            "working_set_tokens": 2 * max(args.budgets),
            "min_context_tokens": 512,
            "host_pool_gib": 1.0,
            "segmenter": "punctuation",
        },
        block_size=args.block_size,
        max_prompt_tokens=args.tokens,
        max_requests=1,
        kv_cache_bytes=1 << 30,
        dtype=args.dtype,
    )
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    runtime = get_kv_transfer_group().runtime
    sources = Sources(args.model, args.text_folder, args.code_folder)
    names = [name if name.startswith("real/") else f"real/{name}" for name in args.tasks]
    print("| task | budget | attention | estimate | distance | lookups | found | hit rate |")
    print("|---|---|---|---|---|---|---|---|")
    for problems in real_problems(sources, names, [args.tokens], args.items, args.seed):
        prompts = [problem.make(engine.count_tokens).prompt for problem in problems]
        for budget in args.budgets:
            options = {
                "sentencekv_token_budget": budget,
                "sentencekv_retention": args.retention,
            }
            requests = [Request(prompt, args.answer_tokens, options) for prompt in prompts]
            with watching(runtime, runtime.layout) as held:
                done = [engine.complete([request])[0] for request in requests]
            share, estimate, gap, found = held.means()
            hits = sum(answer.summary["hits"] for answer in done)
            misses = sum(answer.summary["misses"] for answer in done)
            print(
                f"| {problems[0].cell.task} | {budget} | {share:.3f} | {estimate:.3f} | {gap:.3f} "
                f"| {held.lookups} | {found:.3f} | {hits / max(hits + misses, 1):.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
