# SPDX-License-Identifier: Apache-2.0
"""SnapKV and its kin on a served model: who votes, what is kept, what is answered."""

from __future__ import annotations

from os.path import commonprefix

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from engine import BLOCK, apart, generate, greedy, is_clean, make_items, make_llm, runtime_of  # noqa: E402

WINDOW = 32
ROOM = {"observation_window": WINDOW, "recent_window": 32, "index_vectors": 1}
PROMPTS = (1500, 1031, 2000)


def elections(policy: str, chunk: int) -> tuple[list[dict], list[dict], bool]:
    """Serve three prompts, twice: the second time from the prefix cache.

    Returns:
        For each prompt and time the queries that settled and how well the working set holds what
        SnapKV's formula elects; the outputs; whether nothing leaked.
    """
    llm = make_llm(ROOM, max_num_batched_tokens=chunk)
    runtime = runtime_of(llm)
    seen: list[dict] = []
    from sentencekv_vllm.worker.settling import Settling

    settle = Settling.settle

    def checked(self, layer, pools):
        g, layout = runtime.geometry, runtime.layout
        before = pools.cache.clone()
        settle(self, layer, pools)
        for case in self._cases:
            prompt, n = case.prompt, g.block_size
            window = runtime.observations.of(layer, case.slot, WINDOW).float()
            flat = before.flatten(2)[torch.tensor(prompt.block_ids)]  # [blocks, H, N * 2D]
            keys = flat[..., layout.keys].transpose(0, 1).flatten(1, 2)[:, : prompt.num_tokens]
            moved = pools.cache.flatten(2)[case.private][..., layout.keys].transpose(0, 1)
            moved = moved.flatten(1, 2)
            repeated = keys.float().repeat_interleave(g.group_size, 0)  # [Hq, T, D]
            logits = g.scale * window.transpose(0, 1) @ repeated.transpose(1, 2)
            behind = torch.ones(WINDOW, WINDOW).triu(1).bool()
            logits[..., -WINDOW:].masked_fill_(behind, float("-inf"))
            mass = logits.softmax(-1).mean(1)[:, :-WINDOW]
            pooled = torch.nn.functional.avg_pool1d(mass[:, None], 5, 1, 2)[:, 0]
            scores = pooled.unflatten(0, (-1, g.group_size)).mean(1)
            lo, hi = prompt.history_lo * n, prompt.history_hi * n
            best = scores[:, lo:hi].topk(prompt.budget_blocks * n).indices.sort().values + lo
            for h in range(g.num_kv_heads):
                same = (keys[h, best[h]] == moved[h]).all(-1).float().mean()
                seen.append({"layer": layer, "head": h, "same": float(same)})
            seen[-1]["window"] = (prompt.num_tokens, layer, window.clone())

    Settling.settle = checked
    outputs = []
    prompts = [item.prompt for item in make_items(llm, PROMPTS, seed=3)]
    params = greedy(8, stop=None, ignore_eos=True, extra_args={"sentencekv_policy": policy})
    for _ in range(2):
        outputs += generate(llm, prompts, params)
    return seen, outputs, is_clean(llm)


@pytest.mark.slow
def test_the_last_prompt_tokens_elect_what_snapkv_would_whatever_the_chunks():
    (whole, outputs, clean), (parts, in_parts, clean_too) = (
        apart(elections, "snapkv", 8192),
        apart(elections, "snapkv", 1021),
    )
    assert clean and clean_too
    for seen, served in ((whole, outputs), (parts, in_parts)):
        assert len(seen) == 2 * len(PROMPTS) * 4 * 2, "layers and KV heads, each time"
        assert all(s["same"] > 0.97 for s in seen), "near ties apart"
        for output in served:
            assert output["told"]["mode"] == "sparse" and output["told"]["misses"] == 0
        for fresh, cached in zip(served[:3], served[3:], strict=True):
            voting = fresh["prompt_tokens"] - WINDOW
            assert cached["cached"] == voting // BLOCK * BLOCK, "voting tokens are computed"
            assert fresh["generated"][0]["tokens"] == cached["generated"][0]["tokens"]
    windows: list[dict] = [{}, {}]
    for found, seen in zip(windows, (whole, parts), strict=True):
        for prompt, layer, window in (s["window"] for s in seen if "window" in s):
            found.setdefault((prompt, layer), []).append(window)
    for key, (fresh, cached) in windows[0].items():
        for other in (cached, *windows[1][key]):  # bf16 of other chunks
            torch.testing.assert_close(fresh, other, rtol=0.05, atol=0.15)


def characters_right(policies: list[str]) -> tuple[dict[str, int], bool]:
    """How many characters of ten answers are right before the first wrong one, by policy."""
    llm = make_llm(ROOM | {"token_budget": 704, "working_set_tokens": 640})
    items = make_items(llm, [1500] * 10, seed=11, answer_prefix=True)
    right = {}
    for policy in policies:
        params = greedy(extra_args={"sentencekv_policy": policy})
        outputs = generate(llm, [item.prompt for item in items], params)
        # An answer may end before its blocks are copied.
        assert {o["told"]["mode"] for o in outputs} <= {"sparse", "copying"}
        pairs = zip((o["generated"][0]["text"] for o in outputs), items, strict=True)
        right[policy] = sum(len(commonprefix([text, item.target])) for text, item in pairs)
    return right, is_clean(llm)


@pytest.mark.slow
def test_votes_find_more_of_what_the_question_asks_for_than_the_recent_window_has():
    chosen = ["snapkv", "chunkkv", "sentencekv-once", "sentencekv-pool", "clusterkv"]
    right, clean = apart(characters_right, [*chosen, "windowkv", "streaming"])
    assert clean
    assert min(right[policy] for policy in chosen) > right["streaming"]


def budgets_by_layer() -> tuple[list[dict], list[list[int]], list[dict], bool]:
    """Requests of `pyramidkv` and of the server's policy, which has weights of its own, in one
    batch: outputs, blocks that the rows of the fullest steps attend to by layer, outputs of the
    server's policy alone, whether nothing leaked."""
    weights = {"layer_weights": [1.5, 0.5], "token_budget": 512, "working_set_tokens": 960}
    llm = make_llm(ROOM | weights)
    runtime = runtime_of(llm)
    seen: dict[int, dict[int, list[int]]] = {}
    rank = runtime.rank

    def watched(plan, layer, query):
        tables = rank(plan, layer, query)
        n, order = runtime.geometry.block_size, plan.host_slots.argsort()
        held = -(-plan.seq_lens[order.tolist()] // n)  # sinks, budget and recent window
        seen.setdefault(plan.step, {})[layer] = held.tolist()
        return tables

    runtime.rank = watched
    prompts = [item.prompt for item in make_items(llm, PROMPTS[:2], seed=3)]
    params = [
        greedy(24, stop=None, ignore_eos=True, extra_args={"sentencekv_policy": policy})
        for policy in ("pyramidkv", "sentencekv")
    ]
    outputs = generate(llm, prompts, params)
    batches = [layers for layers in seen.values() if len(layers[0]) == 2]
    steps = [[row for layer in sorted(step) for row in step[layer]] for step in batches]
    alone = generate(llm, prompts[1:], params[1])
    return outputs, steps, alone, is_clean(llm)


@pytest.mark.slow
def test_requests_whose_budgets_differ_by_layer_in_different_ways_share_a_batch():
    outputs, steps, alone, clean = apart(budgets_by_layer)
    assert clean
    assert [o["told"]["mode"] for o in outputs] == ["sparse"] * 2
    compacted, recalled = (o["told"] for o in outputs)
    assert compacted["misses"] == 0 and recalled["misses"] > 0
    assert len(steps) > 10
    for step in steps:
        by_layer = [step[i : i + 2] for i in range(0, len(step), 2)]
        first, last = zip(*by_layer, strict=True)
        rows = [[blocks - row[-1] for blocks in row] for row in (first, last)]
        assert len(by_layer) == 4
        # 14 blocks of history: 24, 17, 11, 4 under the pyramid; 21 and 7 under the weights.
        assert sorted(rows) == [[14, 14, 0, 0], [20, 13, 7, 0]]
    assert outputs[1]["generated"][0]["text"] == alone[0]["generated"][0]["text"]
