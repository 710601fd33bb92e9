# SPDX-License-Identifier: Apache-2.0
"""The running mean equals a mean over the sentence's queries, per layer and slot."""

from __future__ import annotations

import torch

from sentencekv_vllm.types import Geometry
from sentencekv_vllm.worker.query_mean import QueryMean

GEOMETRY = Geometry(
    num_layers=2, num_kv_heads=2, group_size=3, head_dim=8, block_size=4, rows_per_page=1, scale=1.0
)


def test_means_run_over_the_open_sentence_of_each_slot_and_layer():
    generator = torch.Generator().manual_seed(3)
    mean = QueryMean(GEOMETRY, num_slots=5)
    sentence: dict[tuple[int, int], list[torch.Tensor]] = {}
    for step in range(30):
        slots = torch.randperm(5, generator=generator)[: 1 + step % 4]
        starts = (torch.rand(len(slots), generator=generator) < 0.3) | (step < 4)
        for layer in range(2):
            query = torch.randn(len(slots), 6, 8, generator=generator)
            result = mean.add(layer, slots, query.bfloat16(), starts)
            assert result.dtype == torch.float32 and result.shape == query.shape
            for i, slot in enumerate(slots.tolist()):
                if starts[i]:
                    sentence[layer, slot] = []
                sentence.setdefault((layer, slot), []).append(query[i].bfloat16().float())
                expected = torch.stack(sentence[layer, slot]).mean(0)
                torch.testing.assert_close(result[i], expected)


def test_a_new_sentence_forgets_even_what_is_no_number():
    mean = QueryMean(GEOMETRY, num_slots=1)
    slot, query = torch.zeros(1, dtype=torch.int64), torch.randn(1, 6, 8)
    mean.add(0, slot, float("nan") * query, torch.tensor([True]))
    torch.testing.assert_close(mean.add(0, slot, query, torch.tensor([True])), query)
