# SPDX-License-Identifier: Apache-2.0
"""I2: the working set is a cache; its size changes the traffic, never the output."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from engine import apart, generate, greedy, is_clean, make_items, make_llm  # noqa: E402

HISTORY = 160  # tokens of the budget: 256 less sinks and recent window
POLICIES = ("sentencekv", "sentencekv-paper", "random", "streaming")


def decode(working_set):
    """Prompts whose history is longer than the largest working set: others stay dense."""
    llm = make_llm(
        {"working_set_tokens": working_set, "index_vectors": 1}, enable_prefix_caching=False
    )
    prompts = [item.prompt for item in make_items(llm, (1500, 1100, 2300))]
    outputs = {
        policy: generate(
            llm,
            prompts,
            greedy(40, stop=None, ignore_eos=True, extra_args={"sentencekv_policy": policy}),
        )
        for policy in POLICIES
    }
    return outputs, is_clean(llm)


@pytest.fixture(scope="module")
def by_size():
    results = {}
    for times in (1, 2, 4):
        results[times], clean = apart(decode, times * HISTORY)
        assert clean
    return results


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_the_working_sets_size_never_changes_the_output(policy, by_size):
    generated = [[o["generated"] for o in by_size[times][policy]] for times in (1, 2, 4)]
    assert all(o["told"]["mode"] == "sparse" for o in by_size[1][policy])
    assert generated[0] == generated[1] == generated[2]


def test_a_larger_working_set_hits_more_often(by_size):
    for policy in ("sentencekv", "sentencekv-paper"):
        rates = [
            sum(o["told"]["hits"] for o in outputs)
            / sum(o["told"]["hits"] + o["told"]["misses"] for o in outputs)
            for outputs in (by_size[times][policy] for times in (1, 4))
        ]
        assert 0 < rates[0] < rates[1] < 1, policy


def test_policies_differ(by_size):
    texts = {p: [o["generated"] for o in by_size[1][p]] for p in POLICIES}
    for a, b in zip(POLICIES, POLICIES[1:], strict=False):
        assert texts[a] != texts[b], f"{a} and {b} give the same bits"
