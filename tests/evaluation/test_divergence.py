# SPDX-License-Identifier: Apache-2.0
"""Forced texts: distance from dense attention, perplexity and next tokens."""

from __future__ import annotations

import numpy as np
import pytest

from sentencekv_vllm.evaluation.divergence import BUCKET, Distributions, measure


def distributions(logprobs, tokens=None):
    table = np.asarray(logprobs, np.float32)
    return Distributions(np.zeros(len(table), np.int64) if tokens is None else tokens, table)


def kl(dense, sparse, prefilled=1):
    return measure(distributions(dense), distributions(sparse), prefilled).kl


def random_pair(steps):
    logits = np.random.default_rng(0).normal(size=(2, steps, 9)).astype(np.float32)
    return [x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in logits]


def test_kl_is_zero_for_equal_and_positive_for_other_distributions():
    dense, sparse = random_pair(5)
    assert kl(dense, dense) == 0
    by_step = (np.exp(dense) * (dense - sparse)).sum(axis=1)
    assert kl(dense, sparse) == pytest.approx(by_step[1:].mean(), rel=1e-5)
    assert kl(dense, sparse, prefilled=0) == pytest.approx(by_step.mean(), rel=1e-5)
    assert kl(dense, sparse) > 0


def test_tokens_of_the_prefill_do_not_count():
    dense = np.log([[0.9, 0.1], [0.5, 0.5]])
    sparse = np.log([[0.1, 0.9], [0.5, 0.5]])
    assert kl(dense, sparse) == 0


def test_what_dense_attention_rules_out_adds_nothing():
    dense = [[0.0, -np.inf]] * 2
    sparse = np.log([[0.5, 0.5]] * 2)
    assert kl(dense, sparse) == pytest.approx(np.log(2))


def test_whole_buckets_are_means_of_their_steps():
    dense, sparse = random_pair(2 * BUCKET + 5)
    found = measure(distributions(dense), distributions(sparse), 0)
    by_step = (np.exp(dense) * (dense - sparse)).sum(axis=1)
    parts = [by_step[:BUCKET], by_step[BUCKET : 2 * BUCKET]]
    assert found.kl_by_length == pytest.approx([part.mean() for part in parts], rel=1e-5)
    assert found.kl == pytest.approx(by_step.mean(), rel=1e-5)


def test_perplexity_and_agreement_are_those_of_the_variant():
    dense = np.log([[0.5, 0.5]] * 4)
    sparse = np.log([[0.1, 0.9], [0.8, 0.2], [0.8, 0.2], [0.4, 0.6]])
    tokens = np.array([0, 0, 1, 1])
    found = measure(distributions(dense), distributions(sparse, tokens), 1)
    assert found.nll == pytest.approx(-np.log([0.8, 0.2, 0.6]).mean())
    assert found.agreement == pytest.approx(2 / 3)
