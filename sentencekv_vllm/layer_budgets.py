# SPDX-License-Identifier: Apache-2.0
"""A budget that differs by layer: a few tiers of consecutive layers, each with its share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .bounds import shown

MAX_TIERS = 4  # a step has a plan for each
LEAST_WEIGHT, MOST_WEIGHT = 0.001, 10.0  # sums and quotients of them are exact enough


def pyramid(beta: float, tiers: int = MAX_TIERS) -> tuple[float, ...]:
    """Weights that fall linearly from the first layer to the last, which has 1 / beta.

    Paper: PyramidKV (arXiv 2406.02069), where layer l of m has
    `2 - 1 / beta - 2 (1 - 1 / beta) l / (m - 1)` of the mean budget; a tier has the mean over its
    share of the depth.
    """
    centres = ((tier + 0.5) / tiers for tier in range(tiers))
    return tuple(2 - 1 / beta - 2 * (1 - 1 / beta) * centre for centre in centres)


def weights_error(weights: Sequence[Any]) -> str | None:
    """What is wrong with weights that a user has set, and the fix; None: nothing."""
    if not 1 <= len(weights) <= MAX_TIERS:
        return f"layer_weights has 1 to {MAX_TIERS} entries, got {len(weights)}: merge neighbours"
    if not all(type(w) in (int, float) and w > 0 for w in weights):
        return f"layer_weights are positive numbers, got {shown(weights)}: every layer has a block"
    if not all(LEAST_WEIGHT <= w <= MOST_WEIGHT for w in weights):
        return (
            f"layer_weights are from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}, got {shown(weights)}: "
            "bring them closer together"
        )
    mean = sum(weights) / len(weights)
    if abs(mean - 1) > 0.01:
        fixed = [round(w / mean, 4) for w in weights]
        return f"layer_weights have a mean of 1, got {mean:.4g}: set them to {fixed}"
    return None


def layer_blocks(
    weights: Sequence[float], mean: int, limit: int, num_layers: int, layer_share: int = 1
) -> tuple[int, ...]:
    """Blocks that each layer selects per KV head.

    Their mean over the layers is as near to `mean` as whole blocks allow, and never above it but
    for the one block that each layer has. What a tier cannot hold goes to the others.

    Args:
        weights: one a tier, from the first layers to the last; only their ratios count.
        mean: blocks, at least 1.
        limit: most blocks of a layer, at least `mean`: the working set.
        num_layers: of the model.
        layer_share: consecutive layers that share a selection; no tier divides them.

    Returns:
        By layer; () where all have `mean`.
    """
    groups = -(-num_layers // layer_share)
    tier_of = [(layer // layer_share) * len(weights) // groups for layer in range(num_layers)]
    sizes = {tier: tier_of.count(tier) for tier in sorted(set(tier_of))}
    weighted = sum(weights[tier] * size for tier, size in sizes.items())
    ideal = {tier: weights[tier] * num_layers * mean / weighted for tier in sizes}
    blocks = {tier: min(max(1, int(share)), limit) for tier, share in ideal.items()}
    left = num_layers * mean - sum(blocks[tier] * size for tier, size in sizes.items())
    while left < 0 and (above := [t for t in sizes if blocks[t] > 1]):
        tier = max(above, key=lambda t: blocks[t] - ideal[t])
        blocks[tier] -= 1
        left += sizes[tier]
    while below := [t for t in sizes if blocks[t] < limit and sizes[t] <= left]:
        tier = max(below, key=lambda t: ideal[t] - blocks[t])
        blocks[tier] += 1
        left -= sizes[tier]
    if set(blocks.values()) == {mean}:
        return ()
    return tuple(blocks[tier] for tier in tier_of)
