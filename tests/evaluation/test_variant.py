# SPDX-License-Identifier: Apache-2.0
"""Variants: what a request is sent with."""

from __future__ import annotations

import pytest

from sentencekv_vllm.config import SentenceKVConfig
from sentencekv_vllm.evaluation.variant import (
    ABLATION,
    DENSE,
    Variant,
    make_variants,
    parse_policies,
)
from sentencekv_vllm.policies import POLICIES
from sentencekv_vllm.request_options import KEYS, RANKING
from sentencekv_vllm.types import IndexKind


def test_policy_and_budget_travel_with_the_request():
    assert Variant(DENSE).options == {"sentencekv": "off"}
    assert Variant("random", 512).options == {
        "sentencekv_policy": "random",
        "sentencekv_token_budget": 512,
    }


def test_a_budget_multiplies_only_what_it_changes():
    variants = make_variants([DENSE, "sentencekv", "streaming", "full"], [128, 256])
    assert variants == (
        Variant(DENSE),
        Variant("sentencekv", 128),
        Variant("sentencekv", 256),
        Variant("streaming"),
        Variant("full"),
    )


def test_every_policy_is_a_variant():
    assert {v.name for v in make_variants([*POLICIES], [256])} == set(POLICIES)


@pytest.mark.parametrize("name", ABLATION)
def test_a_ranking_of_the_ablation_is_one_that_requests_can_ask_for(name):
    options = Variant(name, 256).options
    assert options.keys() <= set(KEYS)
    for key, value in ABLATION[name].items():
        known = RANKING[key][1]
        assert value in known if known else value >= 0


def test_rankings_of_the_ablation_differ():
    assert len({str(sorted(row.items())) for row in ABLATION.values()}) == len(ABLATION)


def test_the_ablation_holds_the_default_and_the_papers_ranking():
    def ranking(name):
        values = {k.removeprefix("sentencekv_"): v for k, v in ABLATION[name].items()}
        policy = SentenceKVConfig.from_dict(values).selection_policy
        return policy.index, policy.query, policy.reduce, policy.retention

    def published(policy):
        return policy.index, policy.query, policy.reduce, policy.retention

    paper, *_ = ABLATION
    assert ranking(paper) == published(POLICIES["sentencekv-paper"])
    default = "codes, current, retention 2"
    assert ranking(default) == published(POLICIES["sentencekv"])


@pytest.mark.parametrize(
    "name,index",
    [
        (DENSE, None),
        ("streaming", None),
        ("sentencekv", IndexKind.TOKEN_CODES),
        ("mean key, current", IndexKind.CENTROID),
    ],
)
def test_a_variant_knows_its_index(name, index):
    assert Variant(name).index is index


def test_all_means_dense_and_every_policy_that_leaves_something_out():
    names = parse_policies("all")
    assert names[0] == DENSE
    assert set(names[1:]) == {name for name, policy in POLICIES.items() if not policy.keeps_all}


def test_options_of_the_request_follow_the_policy():
    (name,) = parse_policies("sentencekv+query=previous+retention=0")
    assert Variant(name, 256).options == {
        "sentencekv_policy": "sentencekv",
        "sentencekv_token_budget": 256,
        "sentencekv_query": "previous",
        "sentencekv_retention": 0,
    }
    assert Variant("sentencekv+index=centroid").index is IndexKind.CENTROID


def test_settings_of_the_server_tell_variants_apart():
    plain, changed = (make_variants(["sentencekv"], [256], server=s)[0] for s in ("", "a=1"))
    assert plain != changed
    assert (str(plain), str(changed)) == ("sentencekv @ 256", "sentencekv [a=1] @ 256")
    assert make_variants([DENSE], [256], server="a=1") == (Variant(DENSE),)


@pytest.mark.parametrize(
    "text,message",
    [
        ("quest,sentencekw", "did you mean 'sentencekv'"),
        ("quest+query", "POLICY"),
        ("dense+query=x", "dense"),
    ],
)
def test_a_list_that_is_wrong_says_where(text, message):
    with pytest.raises(ValueError, match=message):
        parse_policies(text)
