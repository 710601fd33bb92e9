# SPDX-License-Identifier: Apache-2.0
"""Every policy by the name that the user types."""

from .base import Query, SelectionPolicy
from .full import FULL
from .random import RANDOM
from .sentence_kv import SENTENCE_KV
from .sentence_kv_paper import SENTENCE_KV_PAPER
from .streaming import STREAMING

POLICIES: dict[str, SelectionPolicy] = {
    "sentencekv": SENTENCE_KV,
    "sentencekv-paper": SENTENCE_KV_PAPER,
    "full": FULL,
    "streaming": STREAMING,
    "random": RANDOM,
}

__all__ = ["POLICIES", "Query", "SelectionPolicy"]
