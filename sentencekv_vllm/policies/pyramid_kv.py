# SPDX-License-Identifier: Apache-2.0
"""PyramidKV: SnapKV's votes, with more of the budget in the lower layers."""

from __future__ import annotations

from dataclasses import replace

from ..layer_budgets import pyramid
from .snap_kv import SNAP_KV

PYRAMID_KV = replace(SNAP_KV, name="pyramidkv", layer_weights=pyramid(beta=20))
"""The tokens that the end of the prompt attends to most, 1.7 budgets in the first quarter of the
layers and 0.3 in the last.

Paper: PyramidKV (arXiv 2406.02069): attention is spread in low layers and lands on few tokens in
high ones, so budgets fall linearly; the last layer has 1 / beta of the mean, beta = 20 as in the
authors' code.

Differences from the paper: four steps in place of a slope; sinks and recent window are kept in
every layer, and the history's part of the budget is what falls; window, pooling and reduction are
those of `snapkv`, so that the two differ in their budgets alone. A block of vLLM spans all layers,
so a request holds the first quarter's blocks: reads shrink with the mean, memory with the largest.
"""
