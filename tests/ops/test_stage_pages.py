# SPDX-License-Identifier: Apache-2.0
"""Host pages come back byte by byte, and nothing else is written."""

from __future__ import annotations

import pytest
import torch

from sentencekv_vllm.ops.stage_pages import page_stager, stage_pages


def pools(dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    host = torch.randn(9, 2, 8, 32, generator=generator).to(dtype)
    return host, torch.full((20, 2, 8, 32), float("nan"), dtype=dtype, device=device)


PAIRS = torch.tensor([[3, 17], [0, 2], [8, 3], [3, 4]], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pages_arrive_where_they_are_sent(dtype):
    host, cache = pools(dtype)
    stage_pages(host, cache, PAIRS)
    for page, block in PAIRS.tolist():
        assert torch.equal(cache[block], host[page])
    others = sorted(set(range(20)) - set(PAIRS[:, 1].tolist()))
    assert cache[others].isnan().all()


def test_nothing_to_stage_is_nothing_written():
    host, cache = pools(torch.float32)
    stage_pages(host, cache, PAIRS[:0])
    assert cache.isnan().all()


@pytest.mark.gpu
def test_a_gpu_stages_the_same():
    host, cache = pools(torch.bfloat16, "cuda")
    page_stager(cache.device)(host.pin_memory(), cache, PAIRS)
    torch.cuda.synchronize()
    expected = pools(torch.bfloat16)[1]
    stage_pages(host, expected, PAIRS)
    assert torch.equal(cache.cpu().view(torch.int16), expected.view(torch.int16))
