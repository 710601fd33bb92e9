# SPDX-License-Identifier: Apache-2.0
"""Quest and mean-std on a served model: what is chosen, and what is answered."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from engine import BLOCK, apart, generate, greedy, is_clean, make_items, make_llm, runtime_of  # noqa: E402

pytestmark = pytest.mark.vllm

PROMPT = 1500  # tokens
ROOM = {"index_vectors": 2, "index_codes": True}


def worst_choice(policy: str) -> tuple[float, int, list[dict]]:
    """Decode under a policy, and rank every layer anew from the keys of the host pages.

    Returns:
        By how much the best block left out beats the worst one taken, over all steps, layers
        and KV heads, in logits; the number of choices looked at; what the engine returned.
    """
    llm = make_llm(ROOM)
    runtime = runtime_of(llm)
    g, rank = runtime.geometry, runtime.rank
    margins: list[float] = []

    def bound(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Quest, Eq. 1: queries [G, D], keys [blocks, N, D] -> [blocks], mean over G."""
        low, high = keys.amin(1), keys.amax(1)
        ends = torch.maximum(query[:, None] * low[None], query[:, None] * high[None])
        return g.scale * ends.sum(-1).mean(0)

    def checked(plan, layer, query):
        tables = rank(plan, layer, query)
        pools, batch = runtime.pools.layers[layer], plan.batch
        lo, hi = int(batch.history_lo[0]), int(batch.history_hi[0])
        pages = batch.pages[0, lo:hi].long()
        flat = pools.host[pages].flatten(2)[..., runtime._key_offset.long()]
        keys = flat.unflatten(-1, (g.block_size, g.head_dim)).float()  # [blocks, H, N, D]
        for h in range(g.num_kv_heads):
            scores = bound(query[0].unflatten(0, (-1, g.group_size))[h].float(), keys[:, h])
            slots = tables[0, h, lo : lo + int(batch.budget_blocks[0])].long() // g.num_kv_heads
            taken = torch.isin(pages, pools.slot_page[slots, h].long())
            assert int(taken.sum()) == int(batch.budget_blocks[0]) < hi - lo
            margins.append(float(scores[~taken].max() - scores[taken].min()))
        return tables

    runtime.rank = checked
    prompt = make_items(llm, [PROMPT], seed=5)[0].prompt
    params = greedy(8, stop=None, ignore_eos=True, extra_args={"sentencekv_policy": policy})
    outputs = generate(llm, [prompt], params)
    return max(margins), len(margins), outputs


def test_quest_serves_the_blocks_with_the_largest_bounds() -> None:
    margin, choices, (output,) = apart(worst_choice, "quest")
    assert choices == 7 * 4 * 2, "steps after the first token, layers, KV heads"
    assert margin < 1e-4, "no block left out has a larger bound"
    assert output["told"]["mode"] == "sparse"
    assert output["told"]["sentences"] == output["prompt_tokens"] // BLOCK


def answers() -> list[tuple[str, str, tuple[str, ...]]]:
    """(policy, text, answers) of two needles under each policy; the engine must end clean."""
    llm = make_llm({**ROOM, "policy": "mean-std"})
    found = []
    for item in make_items(llm, [PROMPT, PROMPT], seed=20):
        for policy in ("mean-std", "quest", "sentencekv"):
            params = greedy(extra_args={"sentencekv_policy": policy})
            (output,) = generate(llm, [item.prompt], params)
            found.append((policy, output["generated"][0]["text"], item.answers))
    assert is_clean(llm)
    return found


def test_needles_are_found_under_every_policy_of_one_server() -> None:
    for policy, text, wanted in apart(answers):
        assert all(answer in text for answer in wanted), policy
