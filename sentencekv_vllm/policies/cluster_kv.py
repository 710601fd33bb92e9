# SPDX-License-Identifier: Apache-2.0
"""ClusterKV: groups of keys that point the same way, wherever they are in the text."""

from __future__ import annotations

from ..types import Fate, IndexKind, Reduce, Settlement
from .base import SelectionPolicy

CLUSTER_KV = SelectionPolicy(
    name="clusterkv",
    index=IndexKind.CENTROID,
    reduce=Reduce.MEAN,
    grouping="blocks",
    settlement=Settlement(Fate.CLUSTER, window=0, cluster_tokens=80),
)
"""Blocks of keys with similar directions, by the product of the current query and their mean.

Paper: ClusterKV (arXiv 2412.03213): cosine k-means for each head after the prefill, a cluster for
80 tokens on average. Rotary positions are in the keys already, so attention does not mind the
order: the host pages are filled cluster by cluster, and a page is a group.

Differences from the paper: what is ranked and moved is a page of a cluster (a page where two meet
has tokens of both); one selection serves a KV head; generated blocks stay in the order of the text
and are not clustered; a fixed number of iterations.
"""
