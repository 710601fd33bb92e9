# SPDX-License-Identifier: Apache-2.0
"""How a question is decoded: a policy, its budget and the parts of its ranking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config import INDEX_NAMES
from ..policies import POLICIES
from ..types import IndexKind

DENSE = "dense"
"""The request that switches sentencekv off: exact attention on the same engine."""

Options = dict[str, str | int]

_BITS: Options = {"sentencekv_index": "token_bits"}
_MEAN_KEY: Options = {"sentencekv_index": "centroid", "sentencekv_retention": 0}
ABLATION: dict[str, Options] = {
    "mean key, running mean": _MEAN_KEY
    | {"sentencekv_query": "running_mean", "sentencekv_head_reduce": "mean"},
    "mean key, current": _MEAN_KEY | {"sentencekv_head_reduce": "softmax_mean"},
    "1-bit, running mean": _BITS | {"sentencekv_query": "running_mean", "sentencekv_retention": 0},
    "1-bit, previous, retention 5": _BITS | {"sentencekv_query": "previous"},
    "1-bit, current, mean": _BITS | {"sentencekv_head_reduce": "mean", "sentencekv_retention": 0},
    "1-bit, current, max": _BITS | {"sentencekv_head_reduce": "max", "sentencekv_retention": 0},
    **{
        f"1-bit, current, softmax mean, retention {bonus}": _BITS
        | {"sentencekv_head_reduce": "softmax_mean", "sentencekv_retention": bonus}
        for bonus in (0, 3, 5, 7)
    },
}
"""Rankings by name: options that change parts of the `sentencekv` policy. The first is the
paper's, the one with retention 5 is the default. Reductions are compared without retention,
whose unit depends on them."""


@dataclass(frozen=True)
class Variant:
    """One way of decoding.

    Attributes:
        name: of the policy or of a row of `ABLATION`, or `DENSE`.
        budget: tokens attended per KV head and step; None where it changes nothing.
    """

    name: str
    budget: int | None = None

    def __str__(self) -> str:
        return self.name if self.budget is None else f"{self.name} @ {self.budget}"

    @property
    def policy(self) -> str | None:
        """Of `POLICIES`; None for dense attention."""
        if self.name == DENSE:
            return None
        return "sentencekv" if self.name in ABLATION else self.name

    @property
    def index(self) -> IndexKind | None:
        """What sentences are ranked by; None where nothing is ranked."""
        if self.policy is None:
            return None
        given = ABLATION.get(self.name, {}).get("sentencekv_index")
        return INDEX_NAMES[str(given)] if given else POLICIES[self.policy].index

    @property
    def options(self) -> dict[str, Any]:
        """`SamplingParams.extra_args`, or `vllm_xargs` over HTTP."""
        if self.policy is None:
            return {"sentencekv": "off"}
        options: dict[str, Any] = {"sentencekv_policy": self.policy}
        if self.budget is not None:
            options["sentencekv_token_budget"] = self.budget
        return options | ABLATION.get(self.name, {})


def make_variants(
    policies: Sequence[str], budgets: Sequence[int], ablation: bool = False
) -> tuple[Variant, ...]:
    """Every policy at every budget, then the ablation; once where no budget applies."""
    names = [*policies, *(ABLATION if ablation else ())]
    return tuple(
        Variant(name, budget)
        for name in dict.fromkeys(names)
        for budget in (budgets if _has_budget(name) else (None,))
    )


def _has_budget(name: str) -> bool:
    return name in ABLATION or (name != DENSE and POLICIES[name].selects)
