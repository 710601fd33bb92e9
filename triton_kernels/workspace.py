# SPDX-License-Identifier: Apache-2.0
"""Device memory that the kernels of a layer hand to one another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Geometry
from .locate_sentences import GRANULE
from .ordered import LOWEST

CHUNK_TOKENS = 1024  # tokens that one program scores
MAX_BLOCKS = 8192  # of a request: the selection holds a key for each in registers


@dataclass(frozen=True)
class Workspace:
    """Buffers for the largest batch, shared by all layers of a worker.

    S requests, H KV heads, G query heads a KV head, E index_dim, I sentences, K selected
    blocks. Only `best` carries a state from call to call: LOWEST everywhere.
    """

    first: Tensor  # [S, C + 1] int32: sentence that holds token c * GRANULE
    levels: Tensor  # [S, H * G, E] int8
    steps: Tensor  # [S, H * G] float32
    best: Tensor  # [S, H, I, G] int32: largest logit so far, ordered code
    partial: Tensor  # [S, H, chunks, 2, G] float32: maximum and sum of the resident logits
    scores: Tensor  # [S, H, I] float32
    mass: Tensor  # [S, H, I + 1] float32
    blocks: Tensor  # [S, H, K] int32
    coverage: Tensor  # [S, H] float32
    slots: Tensor  # [S, H, K] int32
    misses: Tensor  # [S * H * K, 3] int32
    num_misses: Tensor  # [1] int32
    step: Tensor  # [1] int32: SparseBatch.step on the device, so that a graph can replay

    @staticmethod
    def allocate(
        geometry: Geometry,
        max_requests: int,
        max_pages: int,
        max_sentences: int,
        max_selected: int,
        device: torch.device,
    ) -> Workspace:
        """Buffers for batches of at most these sizes.

        Args:
            max_pages: blocks of the longest request.
            max_selected: blocks that one KV head can select, the R of `private_blocks`.

        Raises:
            ValueError: shapes that the kernels do not cover.
        """
        n = geometry.block_size
        if n % GRANULE or n > 512 or geometry.head_dim % 16 or geometry.head_dim > 256:
            raise ValueError(
                "the Triton kernels take block sizes that are multiples of 16 up to 512 and head "
                f"dims that are multiples of 16 up to 256, not {n} and {geometry.head_dim}"
            )
        if max(max_pages, max_selected) > MAX_BLOCKS:
            tokens = max(max_pages, max_selected) * n
            raise ValueError(
                f"a request has at most {MAX_BLOCKS} blocks: {tokens} tokens in blocks of {n} are "
                f"{tokens // n}; set the block size to {-(-tokens // MAX_BLOCKS // 16) * 16}"
            )
        s, h, g = max_requests, geometry.num_kv_heads, geometry.group_size
        tokens = max_pages * n

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        i32, f32 = torch.int32, torch.float32
        return Workspace(
            first=empty(s, tokens // GRANULE + 1, dtype=i32),
            levels=empty(s, h * g, geometry.index_dim, dtype=torch.int8),
            steps=empty(s, h * g, dtype=f32),
            best=empty(s, h, max_sentences, g, dtype=i32).fill_(LOWEST),
            partial=empty(s, h, -(-tokens // CHUNK_TOKENS), 2, g, dtype=f32),
            scores=empty(s, h, max_sentences, dtype=f32),
            mass=empty(s, h, max_sentences + 1, dtype=f32),
            blocks=empty(s, h, max_selected, dtype=i32),
            coverage=empty(s, h, dtype=f32),
            slots=empty(s, h, max_selected, dtype=i32),
            misses=empty(s * h * max_selected, 3, dtype=i32),
            num_misses=empty(1, dtype=i32),
            step=empty(1, dtype=i32),
        )
