# SPDX-License-Identifier: Apache-2.0
"""Metrics: values worked out by hand from their definitions."""

from __future__ import annotations

import pytest

from sentencekv_vllm.evaluation import scores


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
        # "a c d" is common: 2 * 3 / (4 + 4)
        (scores.rouge_l, "a b c d", ("a c x d",), 0.75),
        (scores.rouge_l, "", ("a",), 0),
        (scores.right_letter, "The correct answer is (C).", ("C",), 1),
        (scores.right_letter, "B) since A is wrong", ("B",), 1),
        (scores.right_letter, "none", ("A",), 0),
        (scores.code_similarity, "# note\nreturn x", ("return x",), 1),
        (scores.any_number_last, "f(3) is -7", ("-7",), 1),
        (scores.right_class(["Date", "Other date", "Place"]), "Other date", ("Other date",), 1),
        (scores.right_class(["Date", "Place"]), "Date or Place", ("Place",), 0.5),
    ],
)
def test_metric(metric, text, references, expected):
    assert metric(text, references) == pytest.approx(expected)
