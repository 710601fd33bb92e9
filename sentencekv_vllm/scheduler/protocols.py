# SPDX-License-Identifier: Apache-2.0
"""What the ledger sees of vLLM's blocks and of the segmentation service."""

from __future__ import annotations

from typing import Protocol

from ..messages import Int32s


class Block(Protocol):
    """A vLLM KV cache block."""

    block_id: int
    ref_cnt: int


class Segmentation(Protocol):
    """The part of `segmentation.service.SegmentationService` that is used here."""

    def submit(self, request_id: str, token_ids: Int32s) -> None: ...

    def poll(self, request_id: str, urgent: bool = False) -> Int32s | None: ...

    def drop(self, request_id: str) -> None: ...

    def split_tail(self, token_ids: Int32s, final: bool = False) -> Int32s: ...

    def is_boundary(self, token_id: int) -> bool: ...
