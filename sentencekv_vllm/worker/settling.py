# SPDX-License-Identifier: Apache-2.0
"""Carries out, layer after layer, what becomes of the histories whose prefill has ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..messages import RequestUpdate, SettledPrompt
from ..ops.cluster_keys import cluster_order
from ..ops.layer_ops import LayerOps
from ..ops.mean_values import GroupTokens, write_mean_values
from ..ops.token_layout import TokenLayout, read_tokens, write_tokens
from ..ops.votes import count_votes, elect_tokens, retained_means
from ..types import Fate, Geometry, LayerPools
from .observations import Observations
from .tables import Tables


@dataclass
class Case:
    """One request, with what settling it needs on the device."""

    slot: int
    prompt: SettledPrompt
    blocks: Tensor  # [n] int64, of the prompt
    private: Tensor  # [budget] int64, where a compacted history goes
    pages: Tensor  # [p] int32, of its first blocks
    rows: Tensor  # [s] int64, of its indexed sentences
    ends: Tensor  # [s] int64, of these sentences
    all_ends: Tensor  # [>= s] int64, of all sentences of the prompt
    estimates: bool  # what is left out is estimated
    elected: Tensor | None = None  # [H, K] int64 tokens, by the layer group's first layer

    def leads(self, layer: int) -> bool:
        """A layer elects for its group; one with another budget than the layer before does, too."""
        first = layer % self.prompt.settlement.layer_group == 0
        return first or self.prompt.budget(layer) != self.prompt.budget(layer - 1)

    def groups(self, lo: int, hi: int) -> Tensor | None:
        """[hi - lo] int64: which tokens are elected together; None: each alone."""
        unit = self.prompt.settlement.unit
        if unit == 1:
            return None
        token = torch.arange(lo, hi, device=self.blocks.device)
        if unit is not None:
            return (token - lo) // unit
        sentence = torch.searchsorted(self.all_ends, token, right=True)
        return sentence - sentence[0]


class Settling:
    """All requests that are settled in one step."""

    def __init__(
        self,
        geometry: Geometry,
        layout: TokenLayout,
        observations: Observations,
        ops: LayerOps,
    ) -> None:
        self._geometry = geometry
        self._layout = layout
        self._observations = observations
        self._ops = ops
        self._cases: list[Case] = []

    def add(self, update: RequestUpdate, tables: Tables) -> None:
        """Take in a request whose update has been applied to the tables."""
        assert update.settled is not None
        device = self._layout.keys.device

        def on_device(values: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.as_tensor(values, dtype=dtype).to(device)

        rows, ends = tables.indexed_sentences(update.slot)
        self._cases.append(
            Case(
                update.slot,
                update.settled,
                on_device(update.settled.block_ids),
                on_device(update.private_blocks or []),
                on_device(tables.pages.of(update.slot).tolist(), torch.int32),
                on_device(rows.tolist()),
                on_device(ends.tolist()),
                on_device(tables.ends.of(update.slot).tolist()),
                bool(tables.options["estimates"][update.slot]),
            )
        )

    def settle(self, layer: int, pools: LayerPools) -> None:
        """Settle one layer.

        All of a step's reads come before its writes to blocks: one that a request has just freed
        may already be in the working set of another.
        """
        moves = []
        for case in self._cases:
            settlement = case.prompt.settlement
            if settlement.fate is Fate.CLUSTER:
                self._cluster(case, pools)
                continue
            if case.elected is None or case.leads(layer):
                case.elected = self._elect(case, layer, pools)
            if settlement.fate is Fate.COMPACT:
                content = read_tokens(pools.cache, case.blocks, case.elected, self._layout)
                moves.append((case.private, content))
            else:
                self._retain(case, case.elected, pools)
        for private, content in moves:
            write_tokens(pools.cache, private, content, self._layout)

    def _elect(self, case: Case, layer: int, pools: LayerPools) -> Tensor:
        """[H, K]: the tokens with the most votes by KV head, ascending."""
        prompt, g, n = case.prompt, self._geometry, self._layout.block_size
        settlement = prompt.settlement
        window = min(settlement.window, prompt.num_tokens)
        query = self._observations.of(layer, case.slot, window)
        lo, hi = prompt.history_lo * n, prompt.num_tokens - window
        if settlement.fate is Fate.COMPACT:  # the blocks behind the history stay as they are
            hi = prompt.history_hi * n
        count = min(int(settlement.factor * prompt.budget(layer) * n), hi - lo)
        group = case.groups(lo, hi)
        elected = []
        for h in range(g.num_kv_heads):  # one at a time: the logits are window * group * tokens
            queries = query[:, h * g.group_size : (h + 1) * g.group_size]
            keys = self._keys(case, h, 0, prompt.num_tokens, pools)
            scores = count_votes(queries, keys, g.scale, settlement)[lo:hi]
            elected.append(elect_tokens(scores, count, group) + lo)
        return torch.stack(elected)

    def _retain(self, case: Case, elected: Tensor, pools: LayerPools) -> None:
        """The sentences' centroids become those of their elected tokens."""
        total, centroids = int(case.ends[-1]), pools.centroids
        assert centroids is not None, "index_vectors is 1 or 2"
        for h, tokens in enumerate(elected):
            keys = self._keys(case, h, 0, total, pools)
            means = retained_means(keys, case.ends, tokens[tokens < total])
            centroids[case.rows, h] = means.to(centroids.dtype)

    def _cluster(self, case: Case, pools: LayerPools) -> None:
        """The history's pages are filled in the order of clusters, and indexed again."""
        prompt, g, n = case.prompt, self._geometry, self._layout.block_size
        lo, hi = prompt.history_lo, prompt.history_hi
        clusters = max(1, (hi - lo) * n // prompt.settlement.cluster_tokens)
        orders = [
            cluster_order(self._keys(case, h, lo * n, hi * n, pools), clusters)
            for h in range(g.num_kv_heads)
        ]
        content = read_tokens(pools.cache, case.blocks, torch.stack(orders) + lo * n, self._layout)
        blocks = torch.arange(hi - lo, device=content.device)
        sorted_blocks = pools.cache.new_empty(hi - lo, *pools.cache.shape[1:])
        write_tokens(sorted_blocks, blocks, content, self._layout)
        # To the ops it is a cache of its own, whose blocks are copied out.
        slot_page, slot_stamp = pools.slot_page[: hi - lo], pools.slot_stamp[: hi - lo]
        source = replace(pools, cache=sorted_blocks, slot_page=slot_page, slot_stamp=slot_stamp)
        key_offset = self._layout.keys.flatten().to(torch.int32)
        block_ids = blocks.to(torch.int32)
        self._ops.index_pages(source, block_ids, case.pages[lo:hi], key_offset)
        spans = torch.tensor([0, n], dtype=torch.int32, device=content.device).repeat(hi - lo, 1)
        rows = case.rows[lo:hi].to(torch.int32)
        self._ops.index_sentences(source, rows, spans, block_ids[:, None], key_offset)
        if case.estimates:
            places = torch.arange(n, device=content.device).repeat(hi - lo)
            groups = GroupTokens(blocks.repeat_interleave(n), places, torch.full_like(blocks, n))
            write_mean_values(source, rows, groups, self._layout)

    def _keys(self, case: Case, head: int, first: int, last: int, pools: LayerPools) -> Tensor:
        """[last - first, D]: a KV head's keys of some of the prompt's tokens."""
        token = torch.arange(first, last, device=case.blocks.device)
        n = self._layout.block_size
        blocks, places = case.blocks[token // n], self._layout.keys[token % n]
        return pools.cache.flatten(2)[blocks[:, None], head, places]
