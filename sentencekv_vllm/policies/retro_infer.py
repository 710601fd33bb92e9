# SPDX-License-Identifier: Apache-2.0
"""RetroInfer: the clusters that fit are attended to, the others are estimated."""

from __future__ import annotations

from dataclasses import replace

from .cluster_kv import CLUSTER_KV

RETRO_INFER = replace(CLUSTER_KV, name="retroinfer", estimate=True)
"""ClusterKV's pages; those left out contribute by mean key, mean value and size.

Paper: RetroInfer (arXiv 2505.02922): its "wave index" attends to the nearest clusters, estimates
the next ones by their centroids and the sums of their values, and leaves out the rest.

Differences from the paper: a group is a page of a cluster and not a cluster; all groups left out
are estimated, none is dropped; clusters are spherical k-means over the whole history at once, as
in `cluster_kv`, and not by segments; one selection serves a KV head. Needs `index_vectors` of 2.
"""
