# SPDX-License-Identifier: Apache-2.0
"""A made-up record: no engine, everything at random."""

from __future__ import annotations

import numpy as np

from sentencekv_vllm.inspection.page import Answer
from sentencekv_vllm.inspection.trace import ABSENT, MISS, Trace


def random_trace(
    prompt: int,
    steps: int,
    layers: int,
    heads: int,
    width: int,
    block_size: int = 32,
    seed: int = 0,
) -> tuple[Answer, Trace]:
    """Heads select up to `width` blocks, the first of them fewer than others."""
    rng = np.random.default_rng(seed)
    history = np.array([[1, prompt // block_size - 3]] * steps, np.int32)
    selected = np.full((steps, layers, heads, width), ABSENT, np.uint16)
    for place in np.ndindex(steps, layers, heads):
        count = width - int(place[2] == 0 and width > 1)
        blocks = np.sort(rng.choice(np.arange(*history[0]), count, replace=False))
        selected[place][:count] = blocks + MISS * rng.integers(0, 2, count)
    ends = np.unique(np.append(rng.integers(1, prompt, prompt // 14), prompt)).astype(np.int32)
    sentences = tuple(f"Sentence {i} </script> & é." for i in range(len(ends)))
    trace = Trace(
        block_size=block_size,
        layers=tuple(range(3, 3 + layers)),
        lengths=np.arange(prompt + 1, prompt + 1 + steps, dtype=np.int32),
        history=history,
        selected=selected,
        estimate=rng.random((steps, layers), np.float32),
        left_out=2,
    )
    tokens = tuple(f" word{t}" for t in range(steps + 1))
    return Answer("made-up", "sentencekv", 256, "Who?", sentences, ends, tokens), trace
