# SPDX-License-Identifier: Apache-2.0
"""A trace as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .trace import Trace

LITTLE_ENDIAN = "<"  # whatever machine writes the page


@dataclass(frozen=True)
class Answer:
    """A request, as text."""

    model: str
    policy: str
    budget: int  # tokens read a step
    question: str  # empty: it is part of the prompt
    sentences: tuple[str, ...]  # of the prompt
    ends: NDArray[np.int32]  # [n] token behind each of them
    tokens: tuple[str, ...]  # of the answer

    @property
    def prompt_tokens(self) -> int:
        return int(self.ends[-1])


def data(answer: Answer, trace: Trace) -> dict[str, Any]:
    """What the page's script reads. Arrays are base64 of little-endian values, row-major."""
    return {
        "model": answer.model,
        "policy": answer.policy,
        "budget": answer.budget,
        "question": answer.question,
        "sentences": answer.sentences,
        "answer": answer.tokens,
        "blockSize": trace.block_size,
        "layers": trace.layers,
        "shape": trace.selected.shape,
        "leftOut": trace.left_out,
        "ends": _packed(answer.ends, "i4"),
        # The step of a request of n tokens makes its token n + 1.
        "tokens": _packed(trace.lengths - answer.prompt_tokens, "i4"),
        "history": _packed(trace.history, "i4"),
        "estimate": _packed(trace.estimate, "f4"),
        "selected": _packed(trace.selected, "u2"),
    }


def _packed(values: NDArray[Any], kind: str) -> str:
    return base64.b64encode(values.astype(LITTLE_ENDIAN + kind).tobytes()).decode()


def render(answer: Answer, trace: Trace) -> str:
    """The page."""
    folder = files(__package__)
    # "<" in JSON: a text of the prompt must not end the script that holds it.
    parts = {
        "STYLE": (folder / "page.css").read_text(encoding="utf-8"),
        "DATA": json.dumps(data(answer, trace)).replace("<", "\\u003c"),
        "SCRIPT": (folder / "page.js").read_text(encoding="utf-8"),
    }
    before = (folder / "page.html").read_text(encoding="utf-8")
    page = ""
    for name, part in parts.items():  # in the order of the file: what is put in is not searched
        head, mark, before = before.partition(f"@{name}@")
        assert mark, f"page.html has no @{name}@"
        page += head + part
    return page + before
