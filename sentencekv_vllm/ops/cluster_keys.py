# SPDX-License-Identifier: Apache-2.0
"""Keys in the order of their clusters."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

ITERATIONS = 10


def cluster_order(keys: Tensor, num_clusters: int) -> Tensor:
    """Sort tokens by the cluster of their keys (ClusterKV, arXiv 2412.03213, Section III-B).

    k-means with cosine similarity from evenly spaced keys, so that equal keys give equal clusters.

    Args:
        keys: [T, D].
        num_clusters: at most T.

    Returns:
        [T] int64: a permutation; tokens of a cluster are neighbours, in their former order.
    """
    directions = normalize(keys.float(), dim=1)
    first = torch.arange(num_clusters, device=keys.device) * len(keys) // num_clusters
    centres = directions[first]
    for _ in range(ITERATIONS):
        cluster = (directions @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, cluster, directions)
        deserted = torch.bincount(cluster, minlength=num_clusters) == 0
        centres = torch.where(deserted[:, None], centres, normalize(sums, dim=1))
    return (directions @ centres.T).argmax(1).argsort(stable=True)
