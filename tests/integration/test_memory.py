# SPDX-License-Identifier: Apache-2.0
"""I5: a sparse request holds a fixed number of blocks, and the scheduler uses the rest."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from engine import (  # noqa: E402
    BLOCK,
    MODEL,
    SETTINGS,
    apart,
    greedy,
    is_clean,
    make_items,
    make_llm,
    scheduler_of,
)

from sentencekv_vllm.config import SentenceKVConfig  # noqa: E402
from sentencekv_vllm.plan.machine import GIB, Machine  # noqa: E402
from sentencekv_vllm.plan.making import make_plan  # noqa: E402
from sentencekv_vllm.plan.model_shape import read_model  # noqa: E402

LENGTHS = (1000, 2000, 4000, 8000, 16000)
DTYPE = "float32"  # where a CPU has no bfloat16 products, prefill takes several times as long


def used_blocks(llm):
    """From the usage that vLLM exports as `vllm:kv_cache_usage_perc`."""
    manager = scheduler_of(llm).kv_cache_manager
    return round(manager.usage * (manager.block_pool.num_gpu_blocks - 1))


def held_in_decode():
    llm = make_llm({}, dtype=DTYPE)
    engine = llm.llm_engine
    resolved = scheduler_of(llm).connector.scheduler.resolved
    held = {}
    for item, length in zip(make_items(llm, LENGTHS), LENGTHS, strict=True):
        for switch in ("on", "off") if length == 8000 else ("on",):
            params = greedy(70, stop=None, ignore_eos=True, extra_args={"sentencekv": switch})
            engine.add_request(f"{length}{switch}", item.prompt, params)
            levels, decoding = [], 0
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if not output.finished:
                        decoding += 1
                        if decoding > 1:  # the prefill's last step has produced the first
                            levels.append(used_blocks(llm))
            held[length, switch] = (min(levels), max(levels), len(levels))
    return held, resolved.resident_blocks, is_clean(llm)


@pytest.mark.slow
def test_a_sparse_request_holds_the_same_few_blocks_whatever_its_context():
    held, bound, clean = apart(held_in_decode)
    model = read_model(MODEL, "auto")
    machine = Machine(GIB, GIB, kv_cache_bytes=GIB)
    need = make_plan(model, machine, 8000, SentenceKVConfig(**SETTINGS), BLOCK).need
    assert need.sparse_blocks == bound and need.dense_blocks == 8000 // BLOCK, "what is planned"
    for length in LENGTHS:
        _, most, steps = held[length, "on"]
        # One more while the open sentence keeps the history's end back.
        assert most <= bound + 1, f"{length} tokens: {most} blocks, {bound} allowed"
        assert steps >= 60
    least_dense = held[8000, "off"][0]
    assert least_dense >= 8000 // BLOCK - 2
    assert held[8000, "on"][1] <= 0.2 * least_dense, "at least 80% fewer"
    assert clean


def crowd(settings, count, num_blocks):
    """Requests of 5K tokens in a pool that holds two of them densely."""
    options = {"max_model_len": 5400, "max_num_seqs": 16, "dtype": DTYPE}
    llm = make_llm(settings, blocks=num_blocks, **options)
    engine, scheduler = llm.llm_engine, scheduler_of(llm)
    items = make_items(llm, [5000] * count, seed=40)
    params = greedy(48, stop=None, ignore_eos=True)
    names = {engine.add_request(str(i), x.prompt, params): x for i, x in enumerate(items)}
    decoding, right = 0, []
    while engine.has_unfinished_requests():
        done = engine.step()
        decoding = max(decoding, sum(not r.is_prefill_chunk for r in scheduler.running))
        for output in (o for o in done if o.finished):
            target = items[int(output.request_id)].target
            right.append(output.outputs[0].text.startswith(target))
    return decoding, sum(right), len(names), settings is None or is_clean(llm)


@pytest.mark.slow
def test_eight_requests_decode_where_two_fit_densely():
    num_blocks = 2 * (5400 // BLOCK) + 1
    dense, dense_right, *_ = apart(crowd, None, 10, num_blocks)
    sparse, right, _, clean = apart(crowd, {"host_pool_gib": 0.5}, 10, num_blocks)
    assert dense <= 2
    assert sparse >= 8
    assert dense_right >= 9 and right >= dense_right - 1
    assert clean
