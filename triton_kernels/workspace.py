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
MAX_BLOCKS = 32768  # of a request


@dataclass(frozen=True)
class Workspace:
    """Buffers for the largest batch, shared by all layers of a worker.

    S requests, H KV heads, G query heads a KV head, D head_dim, W code_width, B blocks of the
    longest request, I sentences, K selected blocks. Only `best` carries a state from call to call:
    LOWEST everywhere. What the server's policies do not need has no elements: levels, tops and sums
    where W is 0, `best` where rows hold no vector.
    """

    first: Tensor  # [S, C + 1] int32: sentence that holds token c * GRANULE
    levels: Tensor  # [S, H * G, W] int8: as in ops.quantize_query, and the three below
    steps: Tensor  # [S, H * G] float32
    mean_levels: Tensor  # [S, H * G, D] int8
    mean_steps: Tensor  # [S, H * G] float32
    tops: Tensor  # [S, H, G, B] int32: as in ops.score_blocks, up to num_pages
    sums: Tensor  # [S, H, G, B] int32
    best: Tensor  # [S, H, I, G] int32: a sentence's largest logit so far, ordered code
    scores: Tensor  # [S, H, I] float32
    mass: Tensor  # [S, H, I] float32
    keys: Tensor  # [S, H, B] int32: of the history's blocks; those of the largest are selected
    shares: Tensor  # [S, H, B] int32: probabilities of blocks
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
        width = geometry.code_width
        coded_pages = max_pages if width else 0
        summarised = max_sentences if geometry.vectors_per_row else 0

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        i8, i32, f32 = torch.int8, torch.int32, torch.float32
        return Workspace(
            first=empty(s, max_pages * n // GRANULE + 1, dtype=i32),
            levels=empty(s, h * g, width, dtype=i8),
            steps=empty(s, h * g, dtype=f32),
            mean_levels=empty(s, h * g, geometry.head_dim if width else 0, dtype=i8),
            mean_steps=empty(s, h * g, dtype=f32),
            tops=empty(s, h, g, coded_pages, dtype=i32),
            sums=empty(s, h, g, coded_pages, dtype=i32),
            best=empty(s, h, summarised, g, dtype=i32).fill_(LOWEST),
            scores=empty(s, h, max_sentences, dtype=f32),
            mass=empty(s, h, max_sentences, dtype=f32),
            keys=empty(s, h, max_pages, dtype=i32),
            shares=empty(s, h, coded_pages, dtype=i32),
            blocks=empty(s, h, max_selected, dtype=i32).zero_(),  # of rows that nobody ranks, too
            coverage=empty(s, h, dtype=f32).zero_(),
            slots=empty(s, h, max_selected, dtype=i32),
            misses=empty(s * h * max_selected, 3, dtype=i32),
            num_misses=empty(1, dtype=i32),
            step=empty(1, dtype=i32),
        )
