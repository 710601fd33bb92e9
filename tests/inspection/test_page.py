# SPDX-License-Identifier: Apache-2.0
"""The page holds the whole record, nothing of it can break out, and it needs nothing else."""

from __future__ import annotations

import base64
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from random_trace import random_trace  # noqa: E402

from sentencekv_vllm.inspection.page import render  # noqa: E402
from sentencekv_vllm.inspection.pieces import pieces  # noqa: E402
from sentencekv_vllm.inspection.recorder import MOST_BYTES  # noqa: E402
from sentencekv_vllm.segmentation import Vocabulary  # noqa: E402


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open = ""
        self.data = ""

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.open = dict(attrs).get("id") or ""

    def handle_data(self, data):
        self.data += data if self.open == "data" else ""

    def handle_endtag(self, tag):
        self.open = ""


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    return tags


def unpacked(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), f"<{kind}")


def test_every_array_comes_back():
    answer, trace = random_trace(prompt=700, steps=5, layers=3, heads=2, width=4)
    data = json.loads(parsed(render(answer, trace)).data)
    assert data["sentences"] == list(answer.sentences) and data["answer"] == list(answer.tokens)
    selected = unpacked(data["selected"], "u2").reshape(data["shape"])
    assert np.array_equal(selected, trace.selected)
    assert np.array_equal(unpacked(data["ends"], "i4"), answer.ends)
    assert np.array_equal(unpacked(data["history"], "i4"), trace.history.ravel())
    assert np.array_equal(unpacked(data["estimate"], "f4"), trace.estimate.ravel())
    assert unpacked(data["tokens"], "i4").tolist() == [1, 2, 3, 4, 5]
    assert (data["layers"], data["leftOut"]) == ([3, 4, 5], 2)


def test_the_text_of_a_prompt_cannot_break_the_page_and_nothing_is_loaded():
    answer, trace = random_trace(prompt=700, steps=2, layers=1, heads=1, width=2)
    page = render(answer, trace)
    tags = parsed(page).found
    assert [tag for tag, _ in tags].count("script") == 2
    assert not [a for _, attrs in tags for a in attrs if a in ("src", "href", "action")]
    assert not re.search(r"url\(|@import|https?://", page)
    assert any("default-src 'none'" in (a.get("content") or "") for _, a in tags)


def test_marks_in_a_prompt_are_text():
    answer, trace = random_trace(prompt=700, steps=2, layers=1, heads=1, width=2)
    marks = ("@DATA@ @SCRIPT@ @STYLE@",) * len(answer.sentences)
    marked = type(answer)(**{**vars(answer), "sentences": marks})
    assert json.loads(parsed(render(marked, trace)).data)["sentences"] == list(marks)


def test_a_page_is_no_larger_than_the_bound_and_the_text():
    answer, trace = random_trace(prompt=32768, steps=16, layers=16, heads=8, width=12)
    size = len(render(answer, trace))
    text = sum(map(len, answer.sentences))
    assert trace.selected.nbytes < MOST_BYTES
    assert size < 4 / 3 * trace.selected.nbytes + 3 * text + 64_000


@pytest.mark.parametrize("ends", [[1, 2, 3, 4, 5], [2, 3, 5], [5]])
def test_pieces_joined_are_the_text_where_tokens_cut_a_character(ends):
    vocabulary = Vocabulary.from_pieces([b"caf", b"\xc3", b"\xa9", b" au", b" lait"])
    found = pieces(vocabulary, np.arange(5, dtype=np.int32), ends)
    assert "".join(found) == "café au lait" and len(found) == len(ends)
