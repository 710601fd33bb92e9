# SPDX-License-Identifier: Apache-2.0
"""Keys of one direction become neighbours."""

from __future__ import annotations

import torch

from sentencekv_vllm.ops.cluster_keys import cluster_order


def test_well_separated_directions_are_found_whatever_their_length_and_order():
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(16)[:5]
    kind = torch.arange(5).repeat_interleave(40)
    lengths = 0.5 + torch.rand(200, 1, generator=generator)
    keys = lengths * (directions[kind] + 0.02 * torch.randn(200, 16, generator=generator))
    shuffle = torch.randperm(40, generator=generator)
    places = (torch.arange(5)[:, None] * 40 + shuffle).T.flatten()  # the kinds take turns
    keys, kind = keys[places], kind[places]
    keys[[0, 40, 80, 120, 160]] = directions  # where k-means starts
    kind[[0, 40, 80, 120, 160]] = torch.arange(5)
    order = cluster_order(keys, 5)
    assert sorted(order.tolist()) == list(range(200))
    runs = torch.split(order, torch.bincount(kind).tolist())
    for i, run in enumerate(runs):
        assert set(kind[run].tolist()) == {i}
        assert run.tolist() == sorted(run.tolist()), "the order of the text"


def test_more_clusters_than_directions_lose_nobody():
    keys = torch.ones(7, 4)
    assert cluster_order(keys, 7).tolist() == list(range(7))
