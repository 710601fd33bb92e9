# SPDX-License-Identifier: Apache-2.0
"""Plain attention without a KV cache that keeps the moments of what it sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..ops.moments import Moments

ROWS = 256  # queries whose logits exist at once, where they are capped or windowed

_current: Recorder | None = None


def current_recorder() -> Recorder | None:
    """What attends in forwards without metadata; None outside of a calibration."""
    return _current


class Recorder:
    """One calibration: each forward is one text, from its first token."""

    def __init__(self, block_size: int) -> None:
        self.moments: dict[str, Moments] = {}  # by layer
        self._block_size = block_size

    @contextmanager
    def active(self) -> Iterator[None]:
        """Attend in place of the layers' implementations."""
        global _current
        _current = self
        try:
            yield
        finally:
            _current = None

    def attend(
        self,
        layer_name: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        scale: float,
        softcap: float,
    ) -> None:
        """Causal attention of one text, counted.

        Args:
            query, output: [T, H * G, D].
            key, value: [T, H, D].
            softcap: of the logits; 0: they are not capped.
        """
        moments = self.moments.setdefault(layer_name, Moments())
        moments.add(query, key, self._block_size)
        output.copy_(attend_causally(query, key, value, scale, softcap))


def attend_causally(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float = 0.0,
    window: int | None = None,
) -> Tensor:
    """Attention of every token to itself and those before it.

    Args:
        query: [T, H * G, D].
        key, value: [T, H, D].
        window: tokens that a token sees, itself included; None: all.

    Returns:
        [T, H * G, D].
    """
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    if not softcap and window is None:
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=True
        )
        return attended[0].transpose(0, 1)
    group = query.shape[1] // key.shape[1]
    k, v = (x.repeat_interleave(group, 1).float() for x in (k, v))
    parts = []
    for start in range(0, len(query), ROWS):
        rows = q[:, :, start : start + ROWS].float()
        end = start + rows.shape[2]
        first = 0 if window is None else max(0, start - window + 1)
        logits = scale * (rows @ k[:, :, first:end].transpose(2, 3))
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        last = torch.arange(start, end, device=query.device)[:, None]
        keys = torch.arange(first, end, device=query.device)
        unseen = keys > last
        if window is not None:
            unseen |= keys <= last - window
        parts.append(logits.masked_fill(unseen, -torch.inf).softmax(-1) @ v[:, :, first:end])
    return torch.cat(parts, 2)[0].transpose(0, 1).to(query.dtype)
