# SPDX-License-Identifier: Apache-2.0
"""How a question is decoded: a policy, its budget and the parts of its ranking."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from ..config import INDEX_NAMES, closest
from ..policies import POLICIES
from ..types import IndexKind

DENSE = "dense"
"""The request that switches sentencekv off: exact attention on the same engine."""

ALL = "all"
"""In a list of policies: dense attention and every policy that leaves something out."""

Options = dict[str, str | int | float]

_CODES: Options = {"sentencekv_index": "token_codes"}
_MEAN_KEY: Options = {
    "sentencekv_index": "centroid",
    "sentencekv_grouping": "sentences",
    "sentencekv_retention": 0,
}
ABLATION: dict[str, Options] = {
    "mean key, running mean": _MEAN_KEY
    | {"sentencekv_query": "running_mean", "sentencekv_head_reduce": "mean"},
    "mean key, current": _MEAN_KEY | {"sentencekv_head_reduce": "softmax_mean"},
    "mean key of blocks, current": _MEAN_KEY
    | {"sentencekv_grouping": "blocks", "sentencekv_head_reduce": "softmax_mean"},
    "codes, running mean": _CODES | {"sentencekv_query": "running_mean", "sentencekv_retention": 0},
    "codes, previous, retention 2": _CODES
    | {"sentencekv_query": "previous", "sentencekv_retention": 2},
    "codes, retention 2, rest estimated": _CODES | {"sentencekv_estimate": "on"},
    **{
        f"codes, current, retention {bonus}": _CODES | {"sentencekv_retention": bonus}
        for bonus in (0, 1, 2, 3)
    },
}
"""Rankings by name: options that change parts of the `sentencekv` policy. The first is the
paper's, the one with codes, the current query and retention 2 is the default."""


@dataclass(frozen=True)
class Variant:
    """One way of decoding.

    Attributes:
        name: `DENSE`, a row of `ABLATION`, or a policy with options of the request behind it:
            `sentencekv+query=previous+retention=0`. Anything else is what another program
            has measured: it can be shown, not asked.
        budget: tokens attended per KV head and step; None where it changes nothing.
        server: settings that differ from the other variants', as shown behind the name.
    """

    name: str
    budget: int | None = None
    server: str = ""

    def __str__(self) -> str:
        name = f"{self.name} [{self.server}]" if self.server else self.name
        return name if self.budget is None else f"{name} @ {self.budget}"

    @property
    def label(self) -> str:
        """Without the budget."""
        return str(replace(self, budget=None))

    @property
    def policy(self) -> str | None:
        """Of `POLICIES`; None for dense attention and for another program's variants."""
        name = "sentencekv" if self.name in ABLATION else self.name.partition("+")[0]
        return name if name in POLICIES else None

    @property
    def index(self) -> IndexKind | None:
        """What sentences are ranked by; None where nothing is ranked."""
        if self.policy is None:
            return None
        given = self._parts.get("sentencekv_index")
        return INDEX_NAMES[str(given)] if given else POLICIES[self.policy].index

    @property
    def vectors(self) -> int:
        """That a sentence's row must hold."""
        if self._parts.get("sentencekv_estimate") == "on":
            return 2
        policy = POLICIES.get(self.policy or "")
        estimates = (
            policy is not None and policy.estimate and "sentencekv_estimate" not in self._parts
        )
        return 2 if estimates else 0 if self.index is None else self.index.vectors

    @property
    def host_kv_dtype(self) -> str:
        """Of the server's swap pool."""
        return self._server_settings.get("host_kv_dtype", "auto")

    @property
    def code_share(self) -> float:
        """Of a key's channels, that have a code on the server."""
        return float(self._server_settings.get("index_share", 0.5))

    @property
    def code_bits(self) -> int:
        """Of a channel."""
        return int(self._server_settings.get("index_bits", 2))

    @property
    def _server_settings(self) -> dict[str, str]:
        settings = (setting.partition("=") for setting in self.server.split(", "))
        return {name: value for name, _, value in settings}

    @property
    def has_budget(self) -> bool:
        return self.policy is not None and POLICIES[self.policy].selects

    @property
    def options(self) -> dict[str, Any]:
        """`SamplingParams.extra_args`, or `vllm_xargs` over HTTP."""
        if self.policy is None:
            return {"sentencekv": "off"}
        options: dict[str, Any] = {"sentencekv_policy": self.policy}
        if self.budget is not None:
            options["sentencekv_token_budget"] = self.budget
        return options | self._parts

    @property
    def _parts(self) -> Options:
        if self.name in ABLATION:
            return ABLATION[self.name]
        given = (part.partition("=") for part in self.name.split("+")[1:])
        return {f"sentencekv_{name}": _value(text) for name, _, text in given}


def _value(text: str) -> str | int | float:
    for number in (int, float):
        with suppress(ValueError):
            return number(text)
    return text


def parse_policies(text: str) -> list[str]:
    """Names of variants from a comma-separated list.

    Raises:
        ValueError: a part of it is no policy, or an option has no value.
    """
    names: list[str] = []
    for name in text.split(","):
        policy, *options = name.split("+")
        if name == ALL:
            names += [DENSE, *(name for name, p in POLICIES.items() if not p.keeps_all)]
        elif policy not in (DENSE, *POLICIES) or (options and policy == DENSE):
            raise ValueError(f"{name!r}: {closest(policy, [ALL, DENSE, *POLICIES])}")
        elif not all("=" in option for option in options):
            raise ValueError(f"{name!r}: write options as POLICY+OPTION=VALUE")
        else:
            names.append(name)
    return list(dict.fromkeys(names))


def make_variants(
    policies: Sequence[str], budgets: Sequence[int], ablation: bool = False, server: str = ""
) -> tuple[Variant, ...]:
    """Every policy at every budget, then the ablation; once where no budget applies."""
    names = [*policies, *(ABLATION if ablation else ())]
    return tuple(
        Variant(name, budget, "" if name == DENSE else server)
        for name in dict.fromkeys(names)
        for budget in (budgets if Variant(name).has_budget else (None,))
    )
