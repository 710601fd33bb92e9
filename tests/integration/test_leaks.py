# SPDX-License-Identifier: Apache-2.0
"""I3: whatever ends a request, everything it held comes back."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from engine import (  # noqa: E402
    apart,
    generate,
    greedy,
    leaks,
    ledger_of,
    make_items,
    make_llm,
    scheduler_of,
)


def endings():
    """Leaks after each way to end, and whether the engine still answers alike."""
    from vllm.v1.request import RequestStatus

    llm = make_llm({"token_budget": 192}, max_num_batched_tokens=512, enable_prefix_caching=False)
    engine, scheduler, ledger = llm.llm_engine, scheduler_of(llm), ledger_of(llm)
    prompts = [item.prompt for item in make_items(llm, (1800, 1300, 900))]
    params = greedy(400, stop=None, ignore_eos=True)
    left, reached = {}, {}

    def start(name, steps):
        names = [engine.add_request(f"{name}{i}", p, params) for i, p in enumerate(prompts)]
        for _ in range(steps):
            engine.step()
        states = [ledger.states[request_id] for request_id in names]
        reached[name] = (
            sum(bool(s.memory.pages) for s in states),
            sum(s.memory.sparse for s in states),
        )
        return names

    def abort(names):
        engine.abort_request(names, internal=True)

    def drain():
        while engine.has_unfinished_requests():
            engine.step()

    before = generate(llm, prompts, greedy(8))
    left["finish"] = leaks(llm)
    generate(llm, prompts, greedy(1))
    left["finish at the first token"] = leaks(llm)
    abort(start("waiting", 0))
    left["abort while waiting"] = leaks(llm)
    abort(start("prefill", 2))
    left["abort in prefill"] = leaks(llm)
    abort(start("decode", 30))
    left["abort in decode"] = leaks(llm)
    names = start("one", 30)
    abort(names[:1])
    engine.step()
    abort(names[1:])
    left["abort one by one"] = leaks(llm)
    scheduler.finish_requests(start("error", 30), RequestStatus.FINISHED_ERROR)
    drain_outputs(engine)
    left["error"] = leaks(llm)
    start("preempted", 30)
    llm.reset_prefix_cache(reset_running_requests=True)
    held = leaks(llm)
    left["preempted, before resumption"] = {
        k: held[k] for k in ("blocks", "host pages", "slots", "private blocks")
    }
    drain()
    left["preempted and finished"] = leaks(llm)
    after = generate(llm, prompts, greedy(8))
    left["end"] = leaks(llm)
    return left, reached, before == after


def drain_outputs(engine):
    """The front end forgets requests that the core has ended behind its back."""
    for request_id in list(engine.output_processor.request_states):
        engine.abort_request([request_id], internal=True)


@pytest.mark.slow
def test_every_way_to_end_gives_everything_back():
    left, reached, alike = apart(endings)
    for ending, held in left.items():
        assert not any(held.values()), f"after {ending}: {held}"
    assert reached["waiting"] == (0, 0)
    pages, sparse = reached["prefill"]
    assert pages and not sparse, "aborted in the middle of the copy-out"
    for name in ("decode", "one", "error", "preempted"):
        assert reached[name] == (3, 3), f"{name}: all sparse"
    assert alike, "answers before and after are the same"
