# SPDX-License-Identifier: Apache-2.0
"""Every policy by the name that the user types."""

from .base import Grouping, SelectionPolicy
from .chunk_kv import CHUNK_KV
from .cluster_kv import CLUSTER_KV
from .full import FULL
from .mean_std import MEAN_STD
from .pyramid_kv import PYRAMID_KV
from .quest import QUEST
from .random import RANDOM
from .retro_infer import RETRO_INFER
from .sentence_kv import SENTENCE_KV
from .sentence_kv_once import SENTENCE_KV_ONCE
from .sentence_kv_paper import SENTENCE_KV_PAPER
from .sentence_kv_pool import SENTENCE_KV_POOL
from .snap_kv import SNAP_KV
from .streaming import STREAMING
from .window_kv import WINDOW_KV

POLICIES: dict[str, SelectionPolicy] = {
    "sentencekv": SENTENCE_KV,
    "sentencekv-paper": SENTENCE_KV_PAPER,
    "sentencekv-pool": SENTENCE_KV_POOL,
    "sentencekv-once": SENTENCE_KV_ONCE,
    "snapkv": SNAP_KV,
    "pyramidkv": PYRAMID_KV,
    "chunkkv": CHUNK_KV,
    "windowkv": WINDOW_KV,
    "clusterkv": CLUSTER_KV,
    "retroinfer": RETRO_INFER,
    "quest": QUEST,
    "mean-std": MEAN_STD,
    "full": FULL,
    "streaming": STREAMING,
    "random": RANDOM,
}

__all__ = ["POLICIES", "Grouping", "SelectionPolicy"]
