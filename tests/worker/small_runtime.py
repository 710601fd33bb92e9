# SPDX-License-Identifier: Apache-2.0
"""A runtime of two layers over random caches, driven by hand-made messages."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from sentencekv_vllm.host_format import HostFormat
from sentencekv_vllm.messages import DecodeOptions, RequestUpdate, SparseRows, StepMessage
from sentencekv_vllm.ops.layer_ops import LayerOps, ReferenceOps
from sentencekv_vllm.ops.sparse_decode import sparse_decode
from sentencekv_vllm.ops.token_layout import TokenLayout
from sentencekv_vllm.types import Geometry, IndexKind, QueryKind, Reduce
from sentencekv_vllm.worker.runtime import Runtime

N, D, HEADS, GROUP = 8, 16, 2, 2
BLOCKS = 60
GEOMETRY = Geometry(
    num_layers=2,
    num_kv_heads=HEADS,
    group_size=GROUP,
    head_dim=D,
    block_size=N,
    rows_per_page=2,
    scale=D**-0.5,
    code_width=D,  # two bits of half of the channels
)
BUDGET, PROMPT_BLOCKS, WINDOW = 3, 14, 6


def make_runtime(
    working_set: int,
    layer_share: int = 1,
    host_format: HostFormat | None = None,
    warm_ops: LayerOps | None = None,
) -> Runtime:
    generator = torch.Generator().manual_seed(0)
    caches = [torch.randn(BLOCKS, HEADS, N, 2 * D, generator=generator) for _ in range(2)]
    keys = torch.arange(N * D).view(N, D)  # the first half of a head-block
    return Runtime(
        replace(GEOMETRY, host_format=host_format, vectors_per_row=2),
        caches,
        TokenLayout(keys, keys + N * D),
        num_pages=50,
        num_slots=3,
        working_set_blocks=working_set,
        ops=ReferenceOps(),
        layer_names=["first", "second"],
        layer_share=layer_share,
        observation_window=WINDOW,
        warm_ops=warm_ops,
    )


def options(**changes) -> DecodeOptions:
    values = {
        "index_kind": int(IndexKind.TOKEN_CODES),
        "reduce": int(Reduce.SOFTMAX_MEAN),
        "retention": 5.0,
        "query_kind": int(QueryKind.CURRENT),
        "budget_blocks": BUDGET,
        "seed": 0,
    }
    return DecodeOptions(**(values | changes))


def turning_sparse(slot, blocks, pages, private, step=1, tail=None, **changes) -> StepMessage:
    """The message of a request's first sparse step, everything in one update."""
    ends = np.arange(5, len(blocks) * N + 1, 5, dtype=np.int32)
    update = RequestUpdate(slot, options(**changes), blocks, pages, pages, ends, private)
    return StepMessage(step, [], [update], rows([slot], [tail or blocks[-1]]))


def rows(slots, tails, hi=PROMPT_BLOCKS - 2) -> SparseRows:
    def column(values):
        return np.asarray(values, np.int32)

    count = len(slots)
    return SparseRows(
        column(slots),
        column(tails),
        column([1] * count),
        column([hi] * count),
        column([PROMPT_BLOCKS * N - 3] * count),
        np.ones(count, np.bool_),
    )


def plan_of(runtime, tails, tables):
    """The one plan of a decode batch whose rows write to the blocks `tails`."""
    (plan,) = plans_of(runtime, tails, tables)
    return plan


def plans_of(runtime, tails, tables):
    return runtime.plan(
        block_table=torch.tensor(tables, dtype=torch.int32),
        slot_mapping=torch.tensor(tails) * N + 3,
        last_tokens=torch.arange(len(tails)),
    )


def attend(runtime, plan, layer, query):
    """Rank, then attention over the tables; K and V are in token order here."""
    tables = runtime.rank(plan, layer, query)
    cache = runtime.pools.layers[layer].cache.view(BLOCKS, HEADS, 2 * N, D)
    key, value = cache.chunk(2, dim=2)
    return sparse_decode(query, key, value, tables, plan.seq_lens, GEOMETRY.scale)[0]
