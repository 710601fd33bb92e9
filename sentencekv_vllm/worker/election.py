# SPDX-License-Identifier: Apache-2.0
"""Carries out what the votes of a prompt decide, layer after layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..messages import Int32s, RequestUpdate, VotedPrompt
from ..ops.token_layout import TokenLayout, read_tokens, write_tokens
from ..ops.votes import count_votes, elect_tokens, retained_means
from ..types import Geometry, LayerPools
from .observations import Observations


@dataclass
class Ballot:
    """One request's election, with what it needs on the device."""

    slot: int
    prompt: VotedPrompt
    blocks: Tensor  # [n] int64, of the prompt
    private: Tensor  # [budget] int64, where a compacted history goes
    rows: Tensor  # [s] int64, of the prompt's indexed sentences
    ends: Tensor  # [s] int64, of these sentences
    elected: Tensor | None = None  # [H, K] int64 tokens, by the layer group's first layer


class Election:
    """All requests whose votes are counted in one step."""

    def __init__(self, geometry: Geometry, layout: TokenLayout, observations: Observations) -> None:
        self._geometry = geometry
        self._layout = layout
        self._observations = observations
        self._ballots: list[Ballot] = []

    def add(self, update: RequestUpdate, rows: Int32s, ends: Int32s) -> None:
        """Take a request in, with the rows and ends of its indexed sentences."""
        assert update.voted is not None

        def on_device(values: Sequence[int] | Int32s) -> Tensor:
            return torch.as_tensor(values, dtype=torch.int64).to(self._layout.keys.device)

        self._ballots.append(
            Ballot(
                update.slot,
                update.voted,
                on_device(update.voted.block_ids),
                on_device(update.private_blocks or []),
                on_device(rows),
                on_device(ends),
            )
        )

    def hold(self, layer: int, pools: LayerPools) -> None:
        """Settle one layer.

        All of a step's reads come before its writes: a block that one request has just freed may
        already be in the working set of another.
        """
        moves = []
        for ballot in self._ballots:
            if ballot.elected is None or layer % ballot.prompt.votes.layer_group == 0:
                ballot.elected = self._elect(ballot, layer, pools)
            if ballot.prompt.votes.compact:
                content = read_tokens(pools.cache, ballot.blocks, ballot.elected, self._layout)
                moves.append((ballot.private, content))
            else:
                self._summarise(ballot, pools)
        for private, content in moves:
            write_tokens(pools.cache, private, content, self._layout)

    def _elect(self, ballot: Ballot, layer: int, pools: LayerPools) -> Tensor:
        """[H, K]: the tokens with the most votes by KV head, ascending."""
        prompt, g, n = ballot.prompt, self._geometry, self._layout.block_size
        window = min(prompt.votes.window, prompt.num_tokens)
        query = self._observations.of(layer, ballot.slot, window)
        lo, hi = prompt.history_lo * n, prompt.num_tokens - window
        if prompt.votes.compact:  # the blocks behind stay as they are
            hi = prompt.history_hi * n
        count = min(int(prompt.votes.factor * prompt.budget_blocks * n), hi - lo)
        elected = []
        for h in range(g.num_kv_heads):  # one at a time: the logits are window * group * tokens
            group = query[:, h * g.group_size : (h + 1) * g.group_size]
            keys = self._keys(ballot, h, prompt.num_tokens, pools)
            scores = count_votes(group, keys, g.scale, prompt.votes)[lo:hi]
            elected.append(elect_tokens(scores, count, prompt.votes.unit) + lo)
        return torch.stack(elected)

    def _summarise(self, ballot: Ballot, pools: LayerPools) -> None:
        """The sentences' centroids become those of their elected tokens."""
        if not len(ballot.rows):
            return
        assert ballot.elected is not None
        total = int(ballot.ends[-1])
        for h, elected in enumerate(ballot.elected):
            keys = self._keys(ballot, h, total, pools)
            means = retained_means(keys, ballot.ends, elected[elected < total])
            pools.centroids[ballot.rows, h] = means.to(pools.centroids.dtype)

    def _keys(self, ballot: Ballot, head: int, count: int, pools: LayerPools) -> Tensor:
        """[count, D]: a KV head's keys of the prompt's first tokens."""
        token = torch.arange(count, device=ballot.blocks.device)
        n = self._layout.block_size
        blocks, places = ballot.blocks[token // n], self._layout.keys[token % n]
        return pools.cache.flatten(2)[blocks[:, None], head, places]
