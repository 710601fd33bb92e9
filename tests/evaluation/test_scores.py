# SPDX-License-Identifier: Apache-2.0
"""Metrics: values worked out by hand from their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from sentencekv_vllm.evaluation import scores
from sentencekv_vllm.evaluation.divergence import mean_kl


@pytest.mark.parametrize(
    "metric,text,references,expected",
    [
        (scores.exact_line, " It is 7.\nMore", ("It is 7.",), 1),
        (scores.exact_line, " It is 7. More", ("It is 7.",), 0),
        (scores.match_all, "found ABC and 12", ("abc", "12", "34", "56"), 0.5),
        (scores.match_any, "in Paris, of course", ("Lyon", "paris"), 1),
        (scores.match_any, "in Rome", ("Lyon", "paris"), 0),
        # 2 of 3 words found, 2 of 2 wanted: 2 * 2 / (3 + 2)
        (scores.token_f1, "The big red house!", ("a red house",), 0.8),
        (scores.token_f1, "green", ("red", "green"), 1),
        (scores.token_f1, "", ("red",), 0),
        (scores.right_number, "12 or 13, so 12", ("12",), 2 / 3),
        (scores.right_number, "none", ("12",), 0),
        (scores.right_paragraph, "It is paragraph 4.", ("Paragraph 4",), 1),
        (scores.first_number, " 71432. Then 5", ("71432",), 1),
        (scores.first_number, "714", ("71432",), 0),
        (scores.has_word, '"a1-b2": "c3-d4"}', ("c3-d4",), 1),
        (scores.has_word, "c3-d44", ("c3-d4",), 0),
    ],
)
def test_metric(metric, text, references, expected):
    assert metric(text, references) == pytest.approx(expected)


def test_kl_is_zero_for_equal_and_positive_for_other_distributions():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(2, 5, 9)).astype(np.float32)
    dense, sparse = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in logits)
    assert mean_kl(dense, dense) == 0
    by_step = (np.exp(dense) * (dense - sparse)).sum(axis=1)
    assert mean_kl(dense, sparse) == pytest.approx(by_step[1:].mean(), rel=1e-5)
    assert mean_kl(dense, sparse) > 0


def test_the_first_token_comes_from_the_prefill_and_does_not_count():
    dense = np.log(np.array([[0.9, 0.1], [0.5, 0.5]], np.float32))
    sparse = np.log(np.array([[0.1, 0.9], [0.5, 0.5]], np.float32))
    assert mean_kl(dense, sparse) == 0


def test_what_dense_attention_rules_out_adds_nothing():
    dense = np.array([[0.0, -np.inf]] * 2, np.float32)
    sparse = np.log(np.array([[0.5, 0.5]] * 2, np.float32))
    assert mean_kl(dense, sparse) == pytest.approx(np.log(2))
