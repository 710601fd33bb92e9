# SPDX-License-Identifier: Apache-2.0
"""I1, I3 and I5 with tensor parallelism: two worker processes, one set of books."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from engine import (  # noqa: E402
    apart,
    generate,
    greedy,
    is_clean,
    make_items,
    make_llm,
    scheduler_of,
)

FULL = {"policy": "full", "stay_dense_when_covered": False, "working_set_tokens": 1600}
PARALLEL = {"tensor_parallel_size": 2, "blocks": 400}
LENGTHS = (1500, 700, 1100)


def bind_ranks():
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, cores))


def outputs(settings):
    bind_ranks()
    llm = make_llm(settings, **PARALLEL)
    prompts = [item.prompt for item in make_items(llm, LENGTHS)]
    found = generate(llm, prompts, greedy(24, stop=None, ignore_eos=True))
    return found, settings is None or is_clean(llm)


def accounts():
    """What every rank holds in the middle of decode, and the blocks in use."""
    bind_ranks()
    llm = make_llm({}, **PARALLEL)

    def held(worker):
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        runtime = get_kv_transfer_group().runtime
        tables = runtime.tables
        return {
            "pages": [tables.pages.of(slot).tolist() for slot in range(8)],
            "rows": [tables.row_pages.of(slot).tolist() for slot in range(8)],
            "sentences": tables.num_indexed.tolist(),
            "private": tables.private.tolist(),
            "heads": runtime.geometry.num_kv_heads,
            "resident": [
                len(set(pools.slot_page[private].unique().tolist()) - {-1})
                for pools in runtime.pools.layers
                for private in tables.private[:1]
            ],
        }

    engine, scheduler = llm.llm_engine, scheduler_of(llm)
    manager = scheduler.kv_cache_manager
    item = make_items(llm, (1800,))[0]
    engine.add_request("one", item.prompt, greedy(40, stop=None, ignore_eos=True))
    most, ranks = 0, []
    for step in range(30):
        engine.step()
        if step >= 2:
            usage = manager.usage * (manager.block_pool.num_gpu_blocks - 1)
            most = max(most, round(usage))
        if step == 20:
            ranks = llm.collective_rpc(held)
    while engine.has_unfinished_requests():
        engine.step()
    bound = scheduler.connector.scheduler.resolved.resident_blocks
    return ranks, most, bound, is_clean(llm)


two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="vLLM binds each rank to a core of its own"
)


@two_cores
@pytest.mark.slow
def test_full_attention_on_two_ranks_is_bit_identical_to_stock_attention():
    mine, clean = apart(outputs, FULL, timeout_s=500)
    stock, _ = apart(outputs, None, timeout_s=500)
    assert [o["generated"] for o in mine] == [o["generated"] for o in stock]
    assert all(o["told"]["mode"] == "sparse" for o in mine)
    # One head on each rank, four layers: every step but the last is booked, with all ranks.
    for output in mine:
        told = output["told"]
        looked_up = told["hits"] + told["misses"]
        assert looked_up and looked_up % (2 * 4) == 0
        assert told["coverage"] == pytest.approx(1.0, abs=1e-3)
    assert clean


@two_cores
@pytest.mark.slow
def test_both_ranks_keep_the_same_books_and_give_everything_back():
    (first, second), most, bound, clean = apart(accounts, timeout_s=500)
    assert first["heads"] == second["heads"] == 1, "each has its share of the KV heads"
    for name in ("pages", "rows", "sentences", "private"):
        assert first[name] == second[name]
    assert len(first["pages"][0]) > 40 and first["sentences"][0] > 40
    assert all(first["resident"]) and all(second["resident"])
    assert most <= bound + 1
    assert clean
