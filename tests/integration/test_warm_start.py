# SPDX-License-Identifier: Apache-2.0
"""`warm_start` on a served model: fewer misses in the first sparse step, the same answers."""

from __future__ import annotations

import time
from statistics import median

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from engine import apart, generate, greedy, is_clean, make_items, make_llm, runtime_of  # noqa: E402

PROMPTS = (1500, 2300, 1031)


def serve(warm_start):
    """Outputs; hits, misses and seconds of each first sparse step; whether nothing leaked."""
    llm = make_llm({"warm_start": warm_start}, max_num_batched_tokens=1024)
    runtime, outputs, steps, first = runtime_of(llm), [], [], []
    apply, take_report = runtime.apply, runtime.take_report

    def applied(message):
        runtime.begun = time.perf_counter()
        apply(message)

    def reported():
        report = take_report()
        if report is not None:
            seconds = time.perf_counter() - runtime.begun
            steps.append((int(report.hits[0]), int(report.misses[0]), seconds))
        return report

    runtime.apply, runtime.take_report = applied, reported
    for item in make_items(llm, PROMPTS, seed=3) * 2:  # the second time from the prefix cache
        steps.clear()
        outputs += generate(llm, [item.prompt], greedy(8, stop=None, ignore_eos=True))
        first.append(steps[0])
    return outputs, first, is_clean(llm)


@pytest.mark.slow
def test_the_first_step_misses_less_and_answers_alike():
    (cold, first, clean), (warm, filled, clean_too) = (
        apart(serve, warm_start) for warm_start in (False, True)
    )
    assert clean and clean_too
    assert [o["generated"] for o in cold] == [o["generated"] for o in warm]
    assert all(o["told"]["mode"] == "sparse" for o in warm)
    assert all(hits == 0 for hits, _, _ in first)
    assert all(b < a for (_, a, _), (_, b, _) in zip(first, filled, strict=True))
    for name, seen in (("cold", first), ("warm", filled)):
        seconds = median(s for _, _, s in seen)
        print(
            f"first sparse step, {name}: misses {[m for _, m, _ in seen]}, {1e3 * seconds:.1f} ms"
        )
