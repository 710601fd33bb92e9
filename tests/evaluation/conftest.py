# SPDX-License-Identifier: Apache-2.0
"""Records of questions that were never asked."""

from __future__ import annotations

import dataclasses

import pytest

from sentencekv_vllm.evaluation.items import Cell
from sentencekv_vllm.evaluation.records import Record
from sentencekv_vllm.evaluation.variant import DENSE, Variant

CELL = Cell("niah_single", "restated", 4096)


def make(seed: int, variant: Variant, score: float, cell: Cell = CELL, **changes) -> Record:
    sparse = variant.name != DENSE
    found = Record(
        **dataclasses.asdict(cell),
        seed=seed,
        variant=variant.name,
        budget=variant.budget,
        score=score,
        text="x",
        target="x",
        depth=0.5,
        kl=0.25 if sparse else 0.0,
        output_tokens=11,
        cached_tokens=0,
        mode="sparse" if sparse else "switched_off",
        sparse_steps=10 if sparse else 0,
        sentences=400 if sparse else 0,
        prompt_tokens=4000,
        hits=30 if sparse else 0,
        misses=10 if sparse else 0,
        coverage=0.5 if sparse else 0.0,
    )
    return dataclasses.replace(found, **changes)


@pytest.fixture
def record():
    """Makes a record: seed, variant, score, and any field by name."""
    return make
