# SPDX-License-Identifier: Apache-2.0
"""How a text that is decoded by force is judged: by dense attention, and by its own words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BUCKET = 32  # decode steps that share a number of `Measured.kl_by_length`


@dataclass(frozen=True)
class Distributions:
    """What the model would have said at each token of a forced text.

    Attributes:
        tokens: [T] the tokens that were forced.
        logprobs: [T, V] natural, before sampling.
    """

    tokens: NDArray[np.int64]
    logprobs: NDArray[np.float32]


@dataclass(frozen=True)
class Measured:
    """Means over decode steps."""

    kl: float  # KL(dense || sparse) in nats
    kl_by_length: tuple[float, ...]  # of each whole `BUCKET` of steps
    nll: float  # nats a token; its exponential is the perplexity
    agreement: float  # share of the tokens that the model would have chosen


def measure(dense: Distributions, sparse: Distributions, prefilled: int) -> Measured:
    """Compare two distributions over the same forced tokens.

    Args:
        dense: of exact attention, T > `prefilled`.
        sparse: of the variant.
        prefilled: first rows that come from the prefill, which is dense for everyone: they do
            not count.
    """
    theirs, ours = (table.logprobs[prefilled:].astype(np.float64) for table in (dense, sparse))
    gaps = np.subtract(theirs, ours, out=np.zeros_like(theirs), where=np.isfinite(theirs))
    kl = (np.exp(theirs) * gaps).sum(axis=1)
    tokens = sparse.tokens[prefilled:]
    return Measured(
        kl=float(kl.mean()),
        kl_by_length=tuple(
            float(kl[end - BUCKET : end].mean()) for end in range(BUCKET, len(kl) + 1, BUCKET)
        ),
        nll=float(-ours[np.arange(len(tokens)), tokens].mean()),
        agreement=float((ours.argmax(axis=1) == tokens).mean()),
    )
