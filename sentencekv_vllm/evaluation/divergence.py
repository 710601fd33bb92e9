# SPDX-License-Identifier: Apache-2.0
"""How far sparse decoding moves the model's distributions from dense decoding's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def mean_kl(dense: NDArray[np.float32], sparse: NDArray[np.float32]) -> float:
    """Mean over decode steps of KL(dense || sparse), in nats.

    The first row comes from the prefill, which is dense for everyone: it does not count.

    Args:
        dense: [T, V] log probabilities of the same forced tokens, T > 1.
        sparse: likewise.
    """
    ours, theirs = dense[1:].astype(np.float64), sparse[1:].astype(np.float64)
    gaps = np.subtract(ours, theirs, out=np.zeros_like(ours), where=np.isfinite(ours))
    return float((np.exp(ours) * gaps).sum(axis=1).mean())
