# SPDX-License-Identifier: Apache-2.0
"""Addresses are 64 bits wide: a swap pool has more than 2**31 elements and bytes."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sentencekv_vllm.ops.load import load_layer_ops
from sentencekv_vllm.types import LayerPools

from .layer_cases import Case, build, copy_pools, same_bytes

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

SHIFT = 700_000  # pages


def at_the_far_end(tensor: Tensor, per_page: int = 1) -> Tensor:
    """The tensor after `SHIFT` pages that are never touched, and so take no memory."""
    try:
        longer = torch.empty(SHIFT * per_page + len(tensor), *tensor.shape[1:], dtype=tensor.dtype)
    except RuntimeError as error:
        pytest.skip(f"no address space for a long pool: {error}")
    longer[SHIFT * per_page :] = tensor
    return longer


def test_pages_at_the_far_end_of_a_long_pool() -> None:
    ops = load_layer_ops("cpu")
    layer = build(Case(dim=64, block=32))
    near, batch = layer.pools, layer.batch
    far = LayerPools(
        cache=copy_pools(near).cache,
        host=at_the_far_end(near.host),
        codes=at_the_far_end(near.codes),
        scales=at_the_far_end(near.scales),
        means=at_the_far_end(near.means),
        mean_scales=at_the_far_end(near.mean_scales),
        page_kept=at_the_far_end(near.page_kept),
        basis=near.basis,
        centroids=at_the_far_end(near.centroids, layer.geometry.rows_per_page),
        kept=at_the_far_end(near.kept, layer.geometry.rows_per_page),
        page_slot=at_the_far_end(near.page_slot),
        slot_page=near.slot_page.clone(),
        slot_stamp=near.slot_stamp.clone(),
    )
    assert far.host.numel() > 2**31
    far_batch = replace(batch, pages=batch.pages + SHIFT, row_pages=batch.row_pages + SHIFT)
    wants, gots = layer.outputs(), layer.outputs()
    for step in range(3):
        query = layer.query(step)
        for pools, rows, out in ((near, batch, wants), (far, far_batch, gots)):
            rows = replace(rows, step=step)
            ops.decode_layer(layer.geometry, pools, rows, query, out)
        assert torch.equal(gots.head_tables, wants.head_tables)
        assert same_bytes(far.cache, near.cache)

    block, page = torch.tensor([1], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    near.cache[1] = far.cache[1] = 1.5
    ops.index_pages(near, block, page, layer.key_offset)
    ops.index_pages(far, block, page + SHIFT, layer.key_offset)
    assert same_bytes(far.host[SHIFT + 2], near.host[2])
    assert same_bytes(far.codes[SHIFT + 2], near.codes[2])
