# SPDX-License-Identifier: Apache-2.0
"""What a policy is: which evidence ranks which groups of the history's tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..types import Fate, IndexKind, QueryKind, Reduce, Settlement

Grouping = Literal["sentences", "blocks"]


@dataclass(frozen=True)
class SelectionPolicy:
    """A named combination of index, query and reduction; the kernels do the rest.

    Attributes:
        name: what the user types.
        index: what a group is scored by; None where nothing is ranked. TOKEN_CODES scores blocks.
        grouping: a group is a `sentences` entry of the segmenter, or one of the KV `blocks`,
            for which no segmenter runs. What is said of sentences elsewhere holds for both.
        opening: budgets that the first token of a sentence attends to, where more than one.
        settlement: what the end of the prefill does to the history; None: nothing.
        query: of the token being decoded, the mean over the group being written, or of the
            decode step before.
        reduce: how a GQA group's scores become one per KV head.
        retention: bonus, in log-probability where `reduce` is SOFTMAX_MEAN and in units of
            the logits otherwise, for groups that the step before selected.
        selects: history blocks are ranked, and attended to within the token budget.
        keeps_all: the whole history is attended to, whatever the budget.
        layer_weights: parts of the budget that tiers of consecutive layers have, of mean 1; ():
            all have the same. See `layer_budgets`.
        estimate: history tokens left out contribute through the mean key and the mean value of
            their groups, see `ops.estimate_unselected`.
    """

    name: str
    index: IndexKind | None
    query: QueryKind = QueryKind.CURRENT
    reduce: Reduce = Reduce.MEAN
    retention: float = 0.0
    selects: bool = True
    keeps_all: bool = False
    grouping: Grouping = "sentences"
    settlement: Settlement | None = None
    opening: float = 0.0
    layer_weights: tuple[float, ...] = ()
    estimate: bool = False

    @property
    def vectors(self) -> int:
        """Vectors that a group's row must hold."""
        return 2 if self.estimate else 0 if self.index is None else self.index.vectors

    @property
    def codes_conflict(self) -> str | None:
        """Why the index does not go with the rest; None: it does."""
        if self.index is not IndexKind.TOKEN_CODES:
            return None
        if self.grouping != "blocks":
            return "index 'token_codes' ranks blocks: set grouping to 'blocks'"
        if self.reduce is not Reduce.SOFTMAX_MEAN:
            return "index 'token_codes' ranks by probability: set head_reduce to 'softmax_mean'"
        return None

    @property
    def estimate_conflict(self) -> str | None:
        """Why `estimate` does not go with the rest; None: it does, or is off."""
        if self.estimate and self.index is not None and self.index.vectors > 1:
            return (
                f"index {self.index.name.lower()!r} keeps something else where mean values would be"
            )
        if self.estimate and self.settlement and self.settlement.fate is not Fate.CLUSTER:
            return f"policy {self.name!r} summarises elected tokens only"
        return None
