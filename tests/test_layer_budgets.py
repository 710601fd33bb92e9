# SPDX-License-Identifier: Apache-2.0
"""Budgets by layer: PyramidKV's slope, whole blocks, and what a user may set."""

from __future__ import annotations

import random

import pytest

from sentencekv_vllm.config import ConfigError, SentenceKVConfig
from sentencekv_vllm.layer_budgets import layer_blocks, pyramid
from sentencekv_vllm.policies import POLICIES
from sentencekv_vllm.request_options import RequestOptions
from sentencekv_vllm.resolved import ResolvedConfig, resolve


def server(num_layers: int = 32, **settings: object) -> ResolvedConfig:
    config = SentenceKVConfig.from_dict(settings)
    return resolve(
        config, block_size=32, num_kv_heads=2, head_dim=64, num_layers=num_layers, dtype_size=2
    )


def test_the_pyramid_is_the_papers_slope_by_quarters():
    """Each layer's share as published, averaged over the quarters of a model of many layers."""
    layers, beta = 4000, 20
    last = 1 / beta
    first = 2 - last
    shares = [first - (first - last) * layer / (layers - 1) for layer in range(layers)]
    assert sum(shares) / layers == pytest.approx(1)
    quarter = layers // 4
    wanted = [sum(shares[i * quarter : (i + 1) * quarter]) / quarter for i in range(4)]
    assert POLICIES["pyramidkv"].layer_weights == pytest.approx(wanted, abs=1e-3)
    assert sum(pyramid(7, 3)) / 3 == pytest.approx(1)


def test_blocks_keep_the_mean_and_every_limit():
    draw = random.Random(0)
    for _ in range(2000):
        weights = [draw.uniform(0.01, 3) for _ in range(draw.randint(1, 4))]
        mean, layers = draw.randint(1, 60), draw.randint(1, 80)
        share, limit = draw.randint(1, 4), draw.randint(mean, 2 * mean)
        blocks = layer_blocks(weights, mean, limit, layers, share) or (mean,) * layers
        assert len(blocks) == layers and all(1 <= b <= limit for b in blocks)
        runs = [blocks.count(b) for b in set(blocks)]
        lacking = layers * mean - sum(blocks)
        assert 0 <= lacking < max(runs), "no tier can have one more"
        borders = [i for i in range(1, layers) if blocks[i] != blocks[i - 1]]
        assert len(borders) < len(weights), "a tier is consecutive"
        assert all(border % share == 0 for border in borders), "no tier divides a shared selection"


def test_more_weight_is_never_fewer_blocks_and_equal_weights_are_no_tiers():
    assert layer_blocks((1.7125, 1.2375, 0.7625, 0.2875), 8, 99, 4) == (14, 10, 6, 2)
    assert layer_blocks((1.0, 1.0), 5, 9, 10) == ()
    assert layer_blocks((1.5, 0.5), 1, 9, 10) == (), "a block is the least"
    assert layer_blocks((1.9, 0.1), 10, 12, 4) == (12, 12, 8, 8), "the rest goes where room is"


def test_a_policys_weights_reach_the_request():
    resolved = server(policy="pyramidkv")
    options = RequestOptions.parse({}, resolved)
    assert len(options.layer_blocks) == 32
    assert sum(options.layer_blocks) == pytest.approx(32 * options.budget_blocks, abs=8)
    assert options.layer_blocks[-1] < options.budget_blocks < options.layer_blocks[0]
    assert resolved.working_set_blocks >= 1.25 * options.layer_blocks[0], "with room to spare"
    uniform = RequestOptions.parse({"sentencekv_policy": "snapkv"}, resolved)
    assert uniform.layer_blocks == () and uniform.budget_blocks == options.budget_blocks


@pytest.mark.parametrize(
    "policy", sorted(name for name, policy in POLICIES.items() if policy.selects)
)
def test_the_server_sets_weights_for_any_policy_that_selects(policy):
    resolved = server(8, policy=policy, layer_weights=[1.5, 0.5], layer_share=2)
    options = RequestOptions.parse({}, resolved)
    first, last = options.layer_blocks[0], options.layer_blocks[-1]
    assert options.layer_blocks == (first,) * 4 + (last,) * 4
    assert first + last == 2 * options.budget_blocks and first > 2 * last


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "1 to 4 entries, got 0"),
        ([1.0] * 5, "1 to 4 entries, got 5"),
        ([2.0, 0.0], "positive numbers"),
        ([1.5, "0.5"], "positive numbers"),
        ([1.5, True], "positive numbers"),
        ([3.0, float("inf")], r"from 0.001 to 10, got \[3.0, inf\]"),
        ([10**400, 1], "from 0.001 to 10, got .a number of 401 digits"),
        ([2 - 1e-9, 1e-9], "from 0.001 to 10"),
        ([2.0, 1.0], r"mean of 1, got 1.5: set them to \[1.3333, 0.6667\]"),
        (1.0, "must be a list of numbers, got 1.0"),
    ],
)
def test_bad_weights_are_refused_with_the_rule(weights, message):
    with pytest.raises(ConfigError, match=message):
        SentenceKVConfig.from_dict({"layer_weights": weights})


@pytest.mark.parametrize("policy", ["full", "streaming"])
def test_weights_need_a_policy_that_selects(policy):
    with pytest.raises(ConfigError, match="selects nothing, so layer_weights cannot apply"):
        SentenceKVConfig.from_dict({"policy": policy, "layer_weights": [1.5, 0.5]})


def test_weights_within_a_percent_are_taken_as_they_are():
    config = SentenceKVConfig.from_dict({"layer_weights": [1.33, 1, 0.67]})
    assert config.selection_policy.layer_weights == (1.33, 1, 0.67)
    assert hash(config), "settings are a key of caches"
