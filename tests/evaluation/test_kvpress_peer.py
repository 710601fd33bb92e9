# SPDX-License-Identifier: Apache-2.0
"""kvpress beside us: equal numbers of kept tokens, and the whole cache answers."""

from __future__ import annotations

import pytest

pytest.importorskip("kvpress", reason="kvpress, of the extra peers, is not installed")

from sentencekv_vllm.evaluation.items import Cell, make_item  # noqa: E402
from sentencekv_vllm.evaluation.kvpress_peer import PRESSES, KVPressPeer  # noqa: E402
from sentencekv_vllm.evaluation.options import MODEL  # noqa: E402
from sentencekv_vllm.evaluation.variant import DENSE  # noqa: E402


@pytest.fixture(scope="module")
def peer():
    return KVPressPeer(MODEL)


@pytest.mark.parametrize("task", ["niah_single", "multi_turn_session"])
def test_every_press_keeps_what_the_budget_says_and_the_whole_cache_answers(peer, task):
    item = make_item(Cell(task, "restated", 700), 0, peer.count_tokens)
    replies = peer.answer(item, [128], [*PRESSES])
    assert set(replies) == {(DENSE, None), *((name, 128) for name in PRESSES)}
    assert item.metric(replies[DENSE, None].text, item.references) == 1
    for (name, budget), reply in replies.items():
        if budget:
            # Whole chunks, one of which is cut by the prompt's end.
            spare = 16 if name == "ChunkKV" else 1
            assert reply.kept_tokens == pytest.approx(budget, abs=spare), name


def test_a_press_that_drops_one_token_of_filler_answers_as_the_whole_cache_does(peer):
    item = make_item(Cell("niah_single", "restated", 400), 1, peer.count_tokens)
    length = peer.count_tokens(item.prompt) + 1
    replies = peer.answer(item, [length - 1], ["StreamingLLM"])
    assert replies["StreamingLLM", length - 1].text == replies[DENSE, None].text
