# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show of the CUDA kernels: pinned memory, streams, graphs.

Their results on a GPU are compared with their definitions in test_cuda.py, and with Triton's
in test_cuda_layer_ops.py.
"""

from __future__ import annotations

import pytest
import torch

from sentencekv_vllm.ops import custom_ops as custom_ops  # registers torch.ops.sentencekv
from sentencekv_vllm.ops.cuda import library

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def built() -> None:
    if library() is None:
        pytest.skip("needs nvcc")


def make_pool(pages: int = 6) -> torch.Tensor:
    return torch.randn(pages, 2, 16, 64).to(torch.bfloat16)


def miss(page: int, head: int, block: int) -> torch.Tensor:
    """The list of one miss in the only region, [1, 1, 1, 3]."""
    return torch.tensor([page, head, block], dtype=torch.int32, device="cuda").view(1, 1, 1, 3)


def test_a_replayed_gather_follows_the_list_and_its_count() -> None:
    host = make_pool().pin_memory()
    cache = torch.zeros_like(host, device="cuda")
    misses, counts = miss(0, 0, 0), torch.ones(1, 1, dtype=torch.int32, device="cuda")
    torch.ops.sentencekv.gather_misses(host, cache, misses, counts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.sentencekv.gather_misses(host, cache, misses, counts)
    cache.zero_()
    expected = torch.zeros_like(host)
    for page, head, block, count in ((3, 1, 2, 1), (5, 0, 4, 0), (5, 0, 1, 1)):
        misses.copy_(miss(page, head, block))
        counts.fill_(count)
        graph.replay()
        if count:
            expected[block, head] = host[page, head]
        assert torch.equal(cache.cpu(), expected)


def test_the_host_may_write_a_page_between_two_gathers() -> None:
    host = make_pool().pin_memory()
    cache = torch.zeros_like(host, device="cuda")
    counts = torch.ones(1, 1, dtype=torch.int32, device="cuda")
    for _ in range(3):
        host.copy_(make_pool())
        torch.ops.sentencekv.gather_misses(host, cache, miss(4, 1, 0), counts)
        assert torch.equal(cache[0, 1].cpu(), host[4, 1])


@pytest.mark.parametrize("to_host", [False, True])
def test_pageable_memory_is_refused(to_host) -> None:
    pageable, cache = make_pool(), make_pool().cuda()
    pairs = torch.tensor([(0, 1)], dtype=torch.int32, device="cuda")
    source, target = (cache, pageable) if to_host else (pageable, cache)
    with pytest.raises(RuntimeError, match="copy_pages could not be launched"):
        torch.ops.sentencekv.copy_pages(source, target, pairs)


@pytest.mark.parametrize("name", ["copy_pages", "copy_page_runs"])
@pytest.mark.parametrize("side_stream", [False, True])
def test_a_page_comes_back_as_it_left(name, side_stream) -> None:
    """Out and in again on one stream; batched copies are used on a stream of their own only."""
    content = make_pool()
    cache, host = content.cuda(), torch.zeros_like(content).pin_memory()
    pairs = torch.tensor([(0, 3), (1, 4), (5, 0)], dtype=torch.int32)
    if name == "copy_pages":
        pairs = pairs.cuda()
    stream = torch.cuda.Stream() if side_stream else torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    copy = getattr(torch.ops.sentencekv, name)
    with torch.cuda.stream(stream):
        copy(cache, host, pairs)
        cache.fill_(float("nan"))  # ordered after the copy out
        copy(host, cache, pairs.flip(1).contiguous())
    stream.synchronize()
    assert torch.equal(cache[[0, 1, 5]].cpu(), content[[0, 1, 5]])
    assert bool(cache[[2, 3, 4]].isnan().all())
