# SPDX-License-Identifier: Apache-2.0
"""Per-request overrides against the server's sizes."""

from __future__ import annotations

import pytest

from sentencekv_vllm.bounds import shown
from sentencekv_vllm.config import SentenceKVConfig
from sentencekv_vllm.policies import POLICIES
from sentencekv_vllm.request_options import RequestOptions, RequestOptionsError
from sentencekv_vllm.resolved import ResolvedConfig, resolve
from sentencekv_vllm.types import IndexKind, QueryKind, Reduce


def server(**settings: object) -> ResolvedConfig:
    config = SentenceKVConfig.from_dict(settings)
    return resolve(config, block_size=32, num_kv_heads=2, head_dim=64, num_layers=4, dtype_size=2)


@pytest.mark.parametrize("extra", [None, {}, {"other_plugin": 3, "kv_transfer_params": {}}])
def test_without_overrides_the_servers_settings_hold(extra):
    resolved = server(retention=3.0)
    options = RequestOptions.parse(extra, resolved)
    assert options == RequestOptions(True, resolved.policy, resolved.budget_blocks)


@pytest.mark.parametrize("budget", [512, "512"])
def test_the_budget_is_counted_in_blocks(budget):
    options = RequestOptions.parse({"sentencekv_token_budget": budget}, server())
    assert options.budget_blocks == 11  # 512 - 32 - 128 = 352 tokens


def test_the_whole_working_set_can_be_asked_for():
    resolved = server()
    extra = {"sentencekv_token_budget": resolved.largest_budget}
    assert RequestOptions.parse(extra, resolved).budget_blocks == resolved.working_set_blocks


def test_a_request_can_be_switched_off():
    assert not RequestOptions.parse({"sentencekv": "off"}, server()).enabled
    assert RequestOptions.parse({"sentencekv": "on"}, server()).enabled


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_can_be_asked_for(name):
    resolved = server(index_vectors=2, observation_window=32)
    options = RequestOptions.parse({"sentencekv_policy": name}, resolved)
    assert options.policy == POLICIES[name]
    expected = {"full": resolved.working_set_blocks, "streaming": 0}
    assert options.budget_blocks == expected.get(name, resolved.budget_blocks)


def test_naming_the_servers_policy_keeps_its_overrides():
    resolved = server(retention=1.5)
    options = RequestOptions.parse({"sentencekv_policy": "sentencekv"}, resolved)
    assert options.policy.retention == 1.5


def test_the_ranking_can_be_taken_apart():
    extra = {
        "sentencekv_index": "centroid",
        "sentencekv_grouping": "blocks",
        "sentencekv_query": "running_mean",
        "sentencekv_head_reduce": "max",
        "sentencekv_retention": 0,
    }
    policy = RequestOptions.parse(extra, server(index_vectors=1)).policy
    found = (policy.index, policy.grouping, policy.query, policy.reduce, policy.retention)
    assert found == (IndexKind.CENTROID, "blocks", QueryKind.RUNNING_MEAN, Reduce.MAX, 0.0)


def test_what_is_left_out_is_estimated_on_demand():
    resolved = server(index_vectors=2)
    assert not RequestOptions.parse({}, resolved).policy.estimate
    assert RequestOptions.parse({"sentencekv_estimate": "on"}, resolved).policy.estimate
    extra = {"sentencekv_policy": "retroinfer", "sentencekv_estimate": "off"}
    assert not RequestOptions.parse(extra, server(index_vectors=1)).policy.estimate


def test_a_server_of_another_policy_keeps_codes_on_demand():
    extra = {"sentencekv_policy": "sentencekv"}
    with pytest.raises(RequestOptionsError, match="index_codes of true"):
        RequestOptions.parse(extra, server(policy="quest"))
    resolved = server(policy="quest", index_codes=True)
    assert RequestOptions.parse(extra, resolved).policy == POLICIES["sentencekv"]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"sentencekv_budget": 512}, ["did you mean 'sentencekv_token_budget'?"]),
        ({"sentencekv_": 1}, ["unknown option 'sentencekv_'"]),
        ({"sentencekv": "maybe"}, ['"on" or "off"', "'maybe'"]),
        ({"sentencekv": True}, ['"on" or "off"', "True"]),
        ({"sentencekv_policy": "random_"}, ["did you mean 'random'?"]),
        ({"sentencekv_policy": ["full"]}, ["['full']"]),
        ({"sentencekv_token_budget": 512.5}, ["whole number", "512.5"]),
        ({"sentencekv_token_budget": True}, ["whole number", "True"]),
        ({"sentencekv_token_budget": "-1"}, ["whole number", "'-1'"]),
        ({"sentencekv_token_budget": 191}, ["191", "smallest budget is 192"]),
        ({"sentencekv_policy": "quest"}, ["'quest'", "2 vectors", "index_vectors of 2"]),
        ({"sentencekv_policy": "snapkv"}, ["'snapkv'", "32 prompt tokens", "observation_window"]),
        ({"sentencekv_index": "mean_std"}, ["'mean_std'", "index_vectors of 2"]),
        ({"sentencekv_estimate": "on"}, ["and estimate", "2 vectors", "index_vectors of 2"]),
        ({"sentencekv_estimate": "yes"}, ["sentencekv_estimate", "on, off"]),
        (
            {"sentencekv_index": "bounds", "sentencekv_estimate": "on"},
            ["'bounds'", "mean values", "sentencekv_estimate to 'off'"],
        ),
        ({"sentencekv_grouping": "page"}, ["sentencekv_grouping", "sentences, blocks"]),
        ({"sentencekv_query": "last"}, ["sentencekv_query", "running_mean, previous"]),
        ({"sentencekv_grouping": "sentences"}, ["ranks blocks", "grouping to 'blocks'"]),
        ({"sentencekv_head_reduce": "max"}, ["by probability", "head_reduce to 'softmax_mean'"]),
        ({"sentencekv_index": "centroid"}, ["'centroid'", "1 vectors", "index_vectors of 1"]),
        ({"sentencekv_index": "centroids"}, ["did you mean 'centroid'?"]),
        ({"sentencekv_retention": "5"}, ["sentencekv_retention", "number", "'5'"]),
        ({"sentencekv_retention": float("inf")}, ["sentencekv_retention", "inf"]),
        ({"sentencekv_retention": 1e39}, ["sentencekv_retention", "at most 10000", "1e+39"]),
        ({"sentencekv_retention": 10**400}, ["at most 10000", "a number of 401 digits"]),
        ({"sentencekv_retention": [5]}, ["sentencekv_retention", "number", "[5]"]),
        ({"sentencekv_index": ["centroid"]}, ["sentencekv_index", "['centroid'] is not known"]),
        ({"sentencekv": ["on"]}, ['"on" or "off"', "['on']"]),
        ({"sentencekv_token_budget": "9" * 5000}, ["whole number of tokens up to 16777216"]),
        ({"sentencekv_token_budget": 10**5000}, ["at most 16777216", "a number of 5001 digits"]),
        ({"sentencekv_token_budget": -(10**50)}, ["at least 1", "a number of 51 digits"]),
        (
            {"sentencekv_policy": "streaming", "sentencekv_query": "current"},
            ["'streaming'", "sentencekv_query", "remove it"],
        ),
        ({"sentencekv_token_budget": 609}, ["609", "14 blocks", "largest budget is 608"]),
    ],
    ids=lambda value: None if isinstance(value, list) else shown(value),
)
def test_a_bad_override_is_refused_with_rule_value_and_fix(extra, words):
    with pytest.raises(RequestOptionsError) as caught:
        RequestOptions.parse(extra, server())
    for word in words:
        assert word in str(caught.value)


def test_a_server_without_working_set_refuses_policies_that_swap():
    resolved = server(policy="streaming", working_set_tokens=0, index_codes=True)
    assert RequestOptions.parse({}, resolved).budget_blocks == 0
    with pytest.raises(RequestOptionsError, match="working_set_tokens of at least 32"):
        RequestOptions.parse({"sentencekv_policy": "sentencekv"}, resolved)
