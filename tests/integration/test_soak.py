# SPDX-License-Identifier: Apache-2.0
"""Two hundred requests, aborts in flight, a pool too small for them: nothing goes wrong."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from engine import apart, greedy, leaks, make_items, make_llm, scheduler_of  # noqa: E402

COUNT = 80


def soak(settings, blocks):
    """Requests arrive over time; every sixth is aborted at some step of its life.

    Every fourth is dense and writes much: sparse ones hardly grow, and nobody would be
    preempted.
    """
    rng = random.Random(7)
    llm = make_llm(
        settings,
        blocks=blocks,
        max_num_batched_tokens=1024,
        max_num_seqs=12,
        max_model_len=2600,
        dtype="float32",
    )
    engine, scheduler = llm.llm_engine, scheduler_of(llm)
    lengths = [rng.choice((120, 300, 700, 1100, 1600)) for _ in range(COUNT)]
    items = make_items(llm, lengths, seed=1000, task="niah_single")
    sparse = greedy(40, logprobs=None)
    dense = greedy(200, stop=None, ignore_eos=True, logprobs=None, extra_args={"sentencekv": "off"})
    doomed = {i: rng.randrange(60) for i in range(0, COUNT, 6)}
    preemptions = 0
    preempt = scheduler._preempt_request

    def counted(*args, **kwargs):
        nonlocal preemptions
        preemptions += 1
        return preempt(*args, **kwargs)

    scheduler._preempt_request = counted
    right, modes, steps, arrived, started = {}, {}, 0, 0, {}
    while arrived < COUNT or engine.has_unfinished_requests():
        while arrived < COUNT and len(scheduler.waiting) < 6:
            engine.add_request(
                str(arrived), items[arrived].prompt, sparse if arrived % 4 else dense
            )
            started[arrived] = steps
            arrived += 1
        for i, age in list(doomed.items()):
            if i in started and steps - started[i] >= age:
                engine.abort_request([str(i)])
                del doomed[i]
        steps += 1
        for output in engine.step():
            if output.finished:
                i = int(output.request_id)
                told = (output.kv_transfer_params or {}).get("sentencekv", {})
                modes[told.get("mode")] = modes.get(told.get("mode"), 0) + 1
                right[i] = output.outputs[0].text.startswith(items[i].target.rstrip())
    return right, modes, preemptions, leaks(llm) if settings is not None else {}


@pytest.mark.slow
def test_many_requests_with_aborts_and_preemption():
    dense, *_ = apart(soak, None, 1600)
    right, modes, preemptions, held = apart(soak, {"token_budget": 320}, 100)
    undisturbed = dense.keys() & right.keys()
    solvable = [i for i in undisturbed if dense[i]]
    wrong = [i for i in solvable if not right[i]]
    assert len(undisturbed) >= 0.8 * COUNT and len(solvable) >= 0.8 * len(undisturbed)
    assert len(wrong) <= 0.03 * len(solvable), f"{len(wrong)} of {len(solvable)}: {wrong}"
    assert preemptions > 0, "the pool must be too small"
    assert modes["sparse"] > 20 and modes["short_context"] > 4
    assert not any(held.values()), held
