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
    "think": "think",
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


def test_the_default_ranks_tokens_by_the_current_query_and_moves_little():
    policy = POLICIES["sentencekv"]
    assert (policy.index, policy.query, policy.reduce, policy.retention) == (
        IndexKind.TOKEN_BITS,
        QueryKind.CURRENT,
        Reduce.SOFTMAX_MEAN,
        3.0,
    )


def test_quest_ranks_blocks_by_their_bounds_and_everything_else_ranks_sentences():
    policy = POLICIES["quest"]
    assert (policy.index, policy.query, policy.reduce, policy.retention) == (
        IndexKind.BOUNDS,
        QueryKind.CURRENT,
        Reduce.MEAN,
        0.0,
    )
    ranks_blocks = {p.name for p in POLICIES.values() if p.index and p.grouping == "blocks"}
    assert ranks_blocks == {"quest", "clusterkv", "retroinfer"}


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


def test_think_is_the_default_with_a_part_of_the_channels():
    assert POLICIES["think"] == replace(
        POLICIES["sentencekv"], name="think", score_channels=POLICIES["think"].score_channels
    )
    assert [p.name for p in POLICIES.values() if p.score_channels != 1] == ["think"]
    assert 0 < POLICIES["think"].score_channels < 1


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
