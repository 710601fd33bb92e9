# SPDX-License-Identifier: Apache-2.0
"""I8: what is freed, unused or null is never read, and what is swapped in is."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from engine import (  # noqa: E402
    apart,
    generate,
    greedy,
    make_items,
    make_llm,
    runtime_of,
    scheduler_of,
)

LENGTHS = (1500, 1100, 2300)
POLICIES = ("sentencekv", "sentencekv-paper")
NAN = float("nan")


class Poison:
    """Overwrites before every forward what no request may read in it."""

    def __init__(self, llm, value=NAN):
        import torch

        self.value = value
        self.torch = torch
        self.runtime, scheduler = runtime_of(llm), scheduler_of(llm)
        self.blocks = scheduler.kv_cache_manager.block_pool.blocks
        manager = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        self.private = manager._private
        self.poisoned = set()
        self.count = 0
        self.apply = self.runtime.apply
        self.runtime.apply = self

    def __call__(self, message):
        self.apply(message)
        private = {b.block_id for blocks in self.private.values() for b in blocks}
        unused = {b.block_id for b in self.blocks if b.ref_cnt == 0 or b.is_null}
        # vLLM's own op multiplies the unwritten rest of a block by zero: no NaN there.
        fresh = self.torch.tensor(sorted(self.poisoned - unused - private), dtype=self.torch.long)
        dead = self.torch.tensor(sorted(unused), dtype=self.torch.long)
        slots = self.torch.tensor(sorted(private), dtype=self.torch.long)
        for pools in self.runtime.pools.layers:
            pools.cache[fresh] = 0
            pools.cache[dead] = self.value
            empty = pools.slot_page[slots] < 0
            slot, head = empty.nonzero(as_tuple=True)
            pools.cache[slots[slot], head] = self.value
        self.poisoned = unused
        self.count += len(dead) + int(len(slots) > 0)


def decode(poisoned):
    llm = make_llm({"working_set_tokens": 640, "index_vectors": 1}, enable_prefix_caching=False)
    poison = Poison(llm) if poisoned else None
    prompts = [item.prompt for item in make_items(llm, LENGTHS)]
    outputs = []
    for policy in POLICIES:
        params = greedy(40, stop=None, ignore_eos=True, extra_args={"sentencekv_policy": policy})
        outputs += generate(llm, prompts, params)
    assert poison is None or poison.count > 40 * 1000
    return outputs


def decode_by_definition(swaps):
    """On the PyTorch ops, where a stage can be left out."""
    import sentencekv_vllm.ops.layer_ops as layer_ops
    import sentencekv_vllm.vllm_glue.worker_side as worker_side

    worker_side.make_layer_ops = lambda sizes: layer_ops.ReferenceOps()
    if not swaps:
        layer_ops.swap_in = lambda pools, misses: None
    llm = make_llm({"working_set_tokens": 640, "index_vectors": 1}, enable_prefix_caching=False)
    Poison(llm, NAN if swaps else 1.0)  # a NaN would not survive ranking
    prompts = [item.prompt for item in make_items(llm, LENGTHS[1:2])]
    return generate(llm, prompts, greedy(6, stop=None, ignore_eos=True))


@pytest.mark.slow
def test_freed_unused_and_null_blocks_are_never_read():
    clean, poisoned = apart(decode, False), apart(decode, True)
    assert all(o["told"]["sparse_steps"] == 39 for o in poisoned)
    for a, b in zip(clean, poisoned, strict=True):
        assert a["generated"] == b["generated"]


@pytest.mark.slow
def test_without_swap_in_the_poison_shows():
    sound, broken = apart(decode_by_definition, True), apart(decode_by_definition, False)
    for a, b in zip(sound, broken, strict=True):
        assert "nan" not in str(a["generated"])
        assert a["generated"] != b["generated"], "the control must break"
        first = [x["generated"][0]["logprobs"][0] for x in (a, b)]
        assert first[0] == first[1], "prefill is untouched"
