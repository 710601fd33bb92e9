# SPDX-License-Identifier: Apache-2.0
"""A made-up request, decoded before there are real ones: GPU kernels are compiled by it.

All of them, in all variants that a request can ask for: what is compiled later is a stall of every
request. Sizes must not be part of a variant (`do_not_specialize` in `triton_kernels/`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..messages import DecodeOptions, RequestUpdate, SparseRows, StepMessage
from ..types import IndexKind, QueryKind, Reduce
from .plan import StepPlan
from .runtime import Runtime

NAME = "warm-up"


def warm_up(runtime: Runtime, attend: Callable[[StepPlan, Tensor], None]) -> None:
    """Copy out, index, rank and attend for each kind of index, in the first layer, often enough
    for a graph of it.

    Nobody may use the KV cache yet: blocks are overwritten. Pools and tables are as new
    afterwards.

    Args:
        attend: ranking and attention of the sparse rows in the first layer, given the plan and
            the queries [1, Hq, D].
    """
    geometry, tables = runtime.geometry, runtime.tables
    n, working_set = geometry.block_size, tables.private.shape[1]
    cache = runtime.pools.layers[0].cache
    num_pages, num_blocks = runtime.pools.host.shape[1], len(cache)
    history = min(working_set + 1, num_pages, runtime.max_pages)
    if num_blocks <= working_set:
        return  # no request of this engine will be sparse
    cache[0].normal_()  # any numbers; the null block stands in for all of the history
    kinds = [(IndexKind.RANDOM, QueryKind.CURRENT, True)]
    if geometry.code_width:
        kinds += [  # and whether the query restarts: if not, `previous` ranks ahead of the layer
            (IndexKind.TOKEN_CODES, QueryKind.PREVIOUS, True),
            (IndexKind.TOKEN_CODES, QueryKind.PREVIOUS, False),
            (IndexKind.TOKEN_CODES, QueryKind.RUNNING_MEAN, True),  # ranks in float32
        ]
    if geometry.vectors_per_row:
        kinds.append((IndexKind.CENTROID, QueryKind.RUNNING_MEAN, True))
    kinds += [
        (kind, QueryKind.CURRENT, True)
        for kind in IndexKind
        if 0 < kind.vectors <= geometry.vectors_per_row
    ]
    pages, zero, step = [*range(history)], np.zeros(1, np.int32), 0
    rows = SparseRows(
        slots=zero,
        tail_blocks=zero,
        history_lo=zero,
        history_hi=zero + history,
        seq_lens=zero + history * n + 1,
        restarts=np.ones(1, np.bool_),
        request_ids=[NAME],
    )
    for kind, query_kind, restarts in kinds:
        decoded = replace(rows, restarts=np.full(1, restarts))
        options = DecodeOptions(
            index_kind=int(kind),
            reduce=int(Reduce.SOFTMAX_MEAN),
            retention=1.0,
            query_kind=int(query_kind),
            budget_blocks=min(working_set, history),
            seed=0,
        )
        update = RequestUpdate(
            slot=0,
            options=options,
            block_ids=[0] * history,
            page_ids=pages,
            row_pages=pages,
            sentence_ends=np.arange(n, history * n + 1, n, dtype=np.int32),
            private_blocks=[*range(1, working_set + 1)],
        )
        for updates in ([update], [], []):  # compiled, captured, replayed
            dropped = [0] if updates and step else []
            runtime.apply(StepMessage(step, dropped, updates, decoded, frees=True))
            step += 1
            runtime.set_batch_order([NAME])
            (plan,) = runtime.plan(
                block_table=torch.zeros(1, history + 1, dtype=torch.int32, device=runtime.device),
                slot_mapping=torch.zeros(1, dtype=torch.int64, device=runtime.device),
                last_tokens=torch.zeros(1, dtype=torch.int64),
            )
            shape = (1, geometry.num_query_heads, geometry.head_dim)
            attend(plan, torch.randn(shape, dtype=cache.dtype, device=runtime.device))
    cache[0].zero_()
    runtime.reset()
