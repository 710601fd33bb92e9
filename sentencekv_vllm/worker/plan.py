# SPDX-License-Identifier: Apache-2.0
"""The sparse part of one step, planned once and used by every layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.layer_ops import DecodeOutputs
from ..types import SparseBatch


@dataclass(frozen=True)
class StepPlan:
    """Rows, tables and buffers of the step's sparse requests."""

    batch: SparseBatch
    rows: Tensor  # [S] int64: the requests' rows, which are also their query tokens' rows
    tokens: Tensor  # [S] int64: positions of their query tokens in the batch
    slots: Tensor  # [S] int64
    seq_lens: Tensor  # [S] int32: tokens attended to
    out: DecodeOutputs
    running: Tensor | None  # [S] bool: ranks by the running mean query; None: nobody does
    starts: Tensor  # [S] bool: the token opens a sentence


def head_tables(
    block_table: Tensor, batch: SparseBatch, seq_lens: Tensor, block_size: int, num_kv_heads: int
) -> tuple[Tensor, Tensor]:
    """Per-KV-head block tables `[sinks | selected | recent]` and their lengths.

    The selected columns hold the null block until each layer writes its own choice; columns
    of freed blocks are never read.

    Args:
        block_table: [S, max_blocks] int32, vLLM's rows of these requests.
        batch: the requests.
        seq_lens: [S] int32: tokens of the request, this step's included.

    Returns:
        tables [S, H, W] int32 of head-block ids `b * H + h`; lengths [S] int32.
    """
    lo, hi, budget = (
        t.long()[:, None] for t in (batch.history_lo, batch.history_hi, batch.budget_blocks)
    )
    num_blocks = (seq_lens.long()[:, None] + block_size - 1) // block_size
    width = int((lo + budget + num_blocks - hi).max())
    column = torch.arange(width, device=block_table.device)[None]
    recent = column - (lo + budget) + hi
    source = torch.where(column < lo, column, recent.minimum(num_blocks - 1))
    selected = (column >= lo) & (column < lo + budget)
    blocks = block_table.long().gather(1, source.clamp(min=0)).masked_fill(selected, 0)
    heads = torch.arange(num_kv_heads, device=block_table.device)
    tables = (blocks[:, None] * num_kv_heads + heads[:, None]).to(torch.int32)
    lengths = (lo + budget - hi).squeeze(1) * block_size + seq_lens
    return tables, lengths.to(torch.int32)
