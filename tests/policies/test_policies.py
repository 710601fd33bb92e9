# SPDX-License-Identifier: Apache-2.0
"""The contract of every policy, and what sets each of them apart."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest

from sentencekv_vllm.policies import POLICIES
from sentencekv_vllm.types import IndexKind, QueryKind, Reduce

MODULES = {
    "sentencekv": "sentence_kv",
    "sentencekv-paper": "sentence_kv_paper",
    "quest": "quest",
    "mean-std": "mean_std",
    "full": "full",
    "streaming": "streaming",
    "random": "random",
    "sentencekv-pool": "sentence_kv_pool",
    "clusterkv": "cluster_kv",
    "retroinfer": "retro_infer",
    "snapkv": "snap_kv",
    "pyramidkv": "pyramid_kv",
    "chunkkv": "chunk_kv",
    "windowkv": "window_kv",
    "sentencekv-once": "sentence_kv_once",
}


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_keeps_the_contract(name):
    policy = POLICIES[name]
    assert policy.name == name
    has_evidence = policy.index is not None or policy.settlement is not None
    assert policy.selects == has_evidence, "what is chosen has evidence"
    assert not (policy.selects and policy.keeps_all)
    assert policy.retention >= 0
    module = import_module(f"sentencekv_vllm.policies.{MODULES[name]}")
    assert module.__doc__, "the idea in one line"


def test_the_paper_ranks_by_mean_keys_and_the_running_mean_query():
    policy = POLICIES["sentencekv-paper"]
    assert (policy.index, policy.query, policy.reduce, policy.retention) == (
        IndexKind.CENTROID,
        QueryKind.RUNNING_MEAN,
        Reduce.MEAN,
        0.0,
    )


def test_the_default_ranks_blocks_by_the_current_query_and_moves_little():
    policy = POLICIES["sentencekv"]
    assert (policy.index, policy.query, policy.reduce, policy.retention) == (
        IndexKind.TOKEN_CODES,
        QueryKind.CURRENT,
        Reduce.SOFTMAX_MEAN,
        2.0,
    )
    assert [p.name for p in POLICIES.values() if p.index is IndexKind.TOKEN_CODES] == ["sentencekv"]


def test_every_policy_is_consistent():
    for policy in POLICIES.values():
        assert policy.codes_conflict is None and policy.estimate_conflict is None


def test_quest_ranks_blocks_by_their_bounds_and_mean_keys_are_of_sentences():
    policy = POLICIES["quest"]
    assert (policy.index, policy.query, policy.reduce, policy.retention) == (
        IndexKind.BOUNDS,
        QueryKind.CURRENT,
        Reduce.MEAN,
        0.0,
    )
    ranked = [p for p in POLICIES.values() if p.index is not None]
    of_blocks = {p.name for p in ranked if p.grouping == "blocks"}
    assert of_blocks == {"sentencekv", "quest", "clusterkv", "retroinfer"}


def test_mean_std_ranks_sentences_by_two_vectors():
    policy = POLICIES["mean-std"]
    assert (policy.index, policy.query, policy.reduce, policy.retention) == (
        IndexKind.MEAN_STD,
        QueryKind.CURRENT,
        Reduce.SOFTMAX_MEAN,
        0.0,
    )


def test_retroinfer_is_clusterkv_with_the_rest_estimated():
    policy = POLICIES["retroinfer"]
    assert replace(policy, name="clusterkv", estimate=False) == POLICIES["clusterkv"]
    assert [p.name for p in POLICIES.values() if p.estimate] == ["retroinfer"]
    assert policy.vectors == 2


def test_pyramidkv_is_snapkv_with_a_budget_that_falls_with_the_layer():
    weights = POLICIES["pyramidkv"].layer_weights
    assert POLICIES["pyramidkv"] == replace(
        POLICIES["snapkv"], name="pyramidkv", layer_weights=weights
    )
    assert list(weights) == sorted(weights, reverse=True) and len(set(weights)) == 4
    assert [p.name for p in POLICIES.values() if p.layer_weights] == ["pyramidkv"]


def test_only_full_keeps_everything_and_only_streaming_attends_to_no_history():
    assert [p.name for p in POLICIES.values() if p.keeps_all] == ["full"]
    assert [p.name for p in POLICIES.values() if not (p.selects or p.keeps_all)] == ["streaming"]
