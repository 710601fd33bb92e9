# SPDX-License-Identifier: Apache-2.0
"""Fills the working set of a request that has just turned sparse, by its prompt's last query.

The first sparse step of a request would swap in its whole selection in every layer. Here a guess
of it is swapped in before the layers ask: what the last prompt token would have selected. The
step then ranks as always, and finds most of its selection resident.

Nothing but residency changes. The guess is ranked without retention, on flags of its own, so the
first real selection finds those of the request as they were; and its slots are stamped with the
step before, so that the step may evict what was guessed wrongly. On a GPU it is queued on the
stream of `prefetch`, under the same rules, with a workspace of its own: other rows of the step
rank inline meanwhile (rule 2 there).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..messages import Int32s, RequestUpdate, SparseRows
from ..ops.layer_ops import DecodeOutputs, LayerOps
from ..types import Geometry, IndexKind, SparseBatch
from .observations import Observations
from .planner import STAGES, attended_blocks
from .pools import Pools
from .tables import Tables
from .transfer import Tallies, Totals, upload

MAX_ROWS = 8  # of a step; further requests start cold


@dataclass(frozen=True)
class Guess:
    """Rows of a step whose working sets are filled, with all that must live until then."""

    step: int
    layers: range  # that have the budgets of the batch
    batch: SparseBatch
    places: Tensor  # [S] int64: of their queries in the observations
    out: DecodeOutputs
    tallies: Tallies


class WarmStart:
    """Selects, resolves and swaps in for the requests that turn sparse."""

    def __init__(
        self,
        geometry: Geometry,
        pools: Pools,
        tables: Tables,
        observations: Observations,
        ops: LayerOps,
        layer_share: int,
    ) -> None:
        """Nothing to do yet.

        Args:
            ops: shares no workspace with those of the layers; of `MAX_ROWS` requests.
        """
        self._geometry, self._tables, self._observations = geometry, tables, observations
        self._ops, self._layer_share = ops, layer_share
        # Written by every layer, never count.
        kept, page_kept = (
            None if flags is None else torch.zeros_like(flags)
            for flags in (pools.layers[0].kept, pools.layers[0].page_kept)
        )
        self._pools = [replace(layer, kept=kept, page_kept=page_kept) for layer in pools.layers]

    def begin(self, step: int, rows: SparseRows, updates: Sequence[RequestUpdate]) -> list[Guess]:
        """What can be filled in a step, for consecutive runs of layers.

        Args:
            rows: of the step.
            updates: of the step, already in the tables.
        """
        known = {u.slot: u.last_query for u in updates if u.private_blocks and u.last_query >= 0}
        index = [i for i, slot in enumerate(rows.slots.tolist()) if slot in known][:MAX_ROWS]
        if not index:
            return []
        columns = ("slots", "tail_blocks", "history_lo", "history_hi", "seq_lens", "restarts")
        chosen = replace(rows, **{name: getattr(rows, name)[index] for name in columns})
        slots = chosen.slots.astype(np.int64)
        window = self._observations.window
        places = slots * window + [known[slot] for slot in slots.tolist()]
        device = self._tables.device
        (at,) = upload([places], device)
        return [
            self._guess(step, chosen, at, layers, attended)
            for layers, attended in attended_blocks(self._tables, chosen)
        ]

    def _guess(
        self, step: int, rows: SparseRows, places: Tensor, layers: range, attended: Int32s
    ) -> Guess:
        batch = self._tables.batch(rows, step - 1, attended)
        count, device = len(rows.slots), self._tables.device
        shape = (count, self._geometry.num_kv_heads, int((rows.history_lo + attended).max()))
        tables = torch.empty(shape, dtype=torch.int32, device=device)
        totals = Totals(count, len(STAGES), device)
        return Guess(
            step,
            layers,
            replace(batch, retention=(batch.index_kind == IndexKind.TOKEN_CODES).float()),
            places,
            DecodeOutputs(tables, totals.hits, totals.misses, totals.coverage, totals.stage_ns),
            Tallies(totals, count),
        )

    def fill(self, guess: Guess, layer: int) -> None:
        """Queue a layer; layers come in ascending order."""
        if layer == guess.layers.start:
            self._ops.set_step(guess.batch.step)
            self._ops.begin_step(guess.batch)
        pools = self._pools[layer]
        if layer % self._layer_share:
            self._ops.reuse_selection(pools, guess.batch, guess.out)
            return
        query = self._observations.at(layer, guess.places)
        self._ops.decode_layer(self._geometry, pools, guess.batch, query, guess.out)
