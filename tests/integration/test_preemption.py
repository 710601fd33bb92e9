# SPDX-License-Identifier: Apache-2.0
"""Preemption by recompute: dense again until the generated tokens are prefilled."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from engine import (  # noqa: E402
    apart,
    greedy,
    is_clean,
    make_items,
    make_llm,
    record,
    scheduler_of,
)

FULL = {"policy": "full", "stay_dense_when_covered": False, "working_set_tokens": 3200}


def forced(settings):
    """Everybody is preempted at the same steps, whatever the attention."""
    llm = make_llm(settings, max_num_batched_tokens=512)
    engine = llm.llm_engine
    params = greedy(60, stop=None, ignore_eos=True)
    for i, item in enumerate(make_items(llm, (1500, 900, 2300))):
        engine.add_request(str(i), item.prompt, params)
    outputs, steps = {}, 0
    while engine.has_unfinished_requests():
        if steps in (2, 25, 50):  # in prefill, and twice in decode
            assert llm.reset_prefix_cache(reset_running_requests=True)
        steps += 1
        outputs |= {o.request_id: record(o) for o in engine.step() if o.finished}
    return [outputs[k] for k in sorted(outputs)], settings is None or is_clean(llm)


@pytest.mark.slow
def test_preempted_and_resumed_under_full_equals_dense():
    (dense, _), (full, clean) = apart(forced, None), apart(forced, FULL)
    for a, b in zip(dense, full, strict=True):
        assert a["generated"] == b["generated"]
        assert b["told"]["mode"] == "sparse"
    assert clean


def small_pool():
    """Sparse requests beside dense ones that grow until blocks run out."""
    llm = make_llm({}, blocks=180, max_num_batched_tokens=512, max_model_len=2200)
    engine, scheduler = llm.llm_engine, scheduler_of(llm)
    preempted = []
    original = scheduler._preempt_request

    def counted(request, *args, **kwargs):
        manager = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        preempted.append(request.request_id in manager._private)
        return original(request, *args, **kwargs)

    scheduler._preempt_request = counted
    items = make_items(llm, [1400] * 3 + [1000] * 6)
    for i, item in enumerate(items):
        params = greedy(
            300, stop=None, ignore_eos=True, extra_args={"sentencekv": "off" if i < 3 else "on"}
        )
        engine.add_request(str(i), item.prompt, params)
    right = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                item = items[int(output.request_id)]
                right += output.outputs[0].text.startswith(item.target)
    return len(items), right, preempted, is_clean(llm)


@pytest.mark.slow
def test_requests_that_are_preempted_for_want_of_blocks_answer_all_the_same():
    count, right, preempted, clean = apart(small_pool)
    assert any(preempted), "a sparse request was among them"
    assert right >= count - 1
    assert clean
