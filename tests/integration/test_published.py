# SPDX-License-Identifier: Apache-2.0
"""SentenceKV as published, written once more from the paper, against what is served."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from engine import apart, generate, greedy, make_items, make_llm, runtime_of  # noqa: E402

pytestmark = pytest.mark.vllm

WINDOW, KERNEL, FACTOR = 32, 7, 3
SINKS = 32
BUDGET, WORKING_SET = 6, 10  # blocks; the first token of a sentence would attend to 18


def compare(prompt_tokens: int) -> list[dict]:
    """Decode one prompt under `sentencekv-pool`; select by the paper from the keys themselves.

    Keys and queries are taken where the model computes them, in the attention layers.

    Returns:
        For each step, layer and KV head: the history's blocks that both select.
    """
    llm = make_llm({"observation_window": WINDOW, "recent_window": 32, "index_vectors": 1})
    runtime = runtime_of(llm)
    g = runtime.geometry
    from sentencekv_vllm.vllm_glue.impl import SplitImpl

    keys: dict[str, list[torch.Tensor]] = {}
    queries: dict[str, list[torch.Tensor]] = {}
    forward, rank = SplitImpl.forward, runtime.rank

    def watched(self, layer, query, key, value, *rest, **named):
        keys.setdefault(layer.layer_name, []).append(
            key.view(-1, g.num_kv_heads, g.head_dim).clone()
        )
        queries.setdefault(layer.layer_name, []).append(
            query.view(-1, g.num_query_heads, g.head_dim).clone()
        )
        return forward(self, layer, query, key, value, *rest, **named)

    tokenizer = llm.get_tokenizer()
    found: list[dict] = []
    sums: dict[int, torch.Tensor] = {}
    names = list(runtime.layer_index)

    def checked(plan, layer, query):
        tables = rank(plan, layer, query)
        batch, n = plan.batch, g.block_size
        lo, hi = int(batch.history_lo[0]), int(batch.history_hi[0])
        budget = int(batch.budget_blocks[0])
        assert budget == (WORKING_SET if bool(plan.restarts[0]) else BUDGET)
        # Algorithm 1: the mean of the queries since the last sentence ended.
        opens = bool(plan.restarts[0])
        total, count = (0, 0) if opens else sums[layer]
        sums[layer] = (total + query[0].float(), count + 1)
        mean = sums[layer][0] / sums[layer][1]
        # The observation window's attention, pooled; the best tokens are retained (Section 4.1).
        prompt = torch.cat(keys[names[layer]])[:prompt_length].float()
        last = torch.cat(queries[names[layer]])[prompt_length - WINDOW : prompt_length].float()
        ends = batch.sentence_ends[0, : int(batch.num_sentences[0])].tolist()
        spans = [(a, b) for a, b in zip([0, *ends], ends, strict=False) if b <= prompt_length]
        for h in range(g.num_kv_heads):
            group = slice(h * g.group_size, (h + 1) * g.group_size)
            logits = g.scale * torch.einsum("wgd,td->gwt", last[:, group], prompt[:, h])
            late = torch.ones(WINDOW, WINDOW, dtype=torch.bool).triu(1)
            logits[..., -WINDOW:] = logits[..., -WINDOW:].masked_fill(late, float("-inf"))
            votes = logits.softmax(-1).sum(1).mean(0)[: prompt_length - WINDOW]
            votes = torch.nn.functional.max_pool1d(votes[None], KERNEL, 1, KERNEL // 2)[0]
            votes[:SINKS] = -1
            kept = set(votes.topk(FACTOR * BUDGET * n).indices.tolist())
            scores = []
            for first, end in spans:
                own = [t for t in range(first, end) if t in kept]
                touches = max(first, lo * n) < min(end, hi * n)
                bucket = prompt[own, h].mean(0) if own and touches else None
                scores.append(-1e30 if bucket is None else float((mean[group] @ bucket).mean()))
            order = sorted(range(len(spans)), key=lambda i: (-scores[i], i))
            wanted: list[int] = []
            for i in order:
                if scores[i] == -1e30:
                    break
                for j in range(max(spans[i][0] // n, lo), min((spans[i][1] - 1) // n, hi - 1) + 1):
                    if j not in wanted and len(wanted) < budget:
                        wanted.append(j)
            slots = tables[0, h, lo : lo + budget].long() // g.num_kv_heads
            pages = runtime.pools.layers[layer].slot_page[slots, h]
            own_pages = batch.pages[0].tolist()
            served = {own_pages.index(int(p)) for p in pages}
            found.append({"wanted": len(wanted), "same": len(served & set(wanted))})
        return tables

    prompt = make_items(llm, [prompt_tokens], seed=8)[0].prompt
    prompt_length = len(tokenizer(prompt).input_ids)
    SplitImpl.forward, runtime.rank = watched, checked
    params = greedy(10, stop=None, ignore_eos=True)
    params.extra_args = {"sentencekv_policy": "sentencekv-pool"}
    generate(llm, [prompt], params)
    return found


@pytest.mark.slow
def test_the_published_method_selects_what_the_paper_selects() -> None:
    found = apart(compare, 1500)
    assert len(found) == 9 * 4 * 2, "steps after the first token, layers, KV heads"
    wanted = sum(f["wanted"] for f in found)
    same = sum(f["same"] for f in found)
    assert wanted > 5 * len(found), "the budget is filled by sentences with retained tokens"
    assert same / wanted > 0.97, "bfloat16 centroids, near ties"
