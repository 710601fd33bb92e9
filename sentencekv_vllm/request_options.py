# SPDX-License-Identifier: Apache-2.0
"""Per-request overrides: `SamplingParams.extra_args`, or `vllm_xargs` over HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from .bounds import MAX_TOKENS, range_error, shown
from .config import INDEX_NAMES, QUERY_NAMES, REDUCE_NAMES, SentenceKVConfig, closest
from .policies import POLICIES, Grouping, SelectionPolicy
from .resolved import ResolvedConfig
from .types import IndexKind

SWITCH, POLICY, BUDGET = "sentencekv", "sentencekv_policy", "sentencekv_token_budget"
RANKING: dict[str, tuple[str, Mapping[str, Any] | None]] = {
    "sentencekv_index": ("index", INDEX_NAMES),
    "sentencekv_grouping": ("grouping", {name: name for name in get_args(Grouping)}),
    "sentencekv_query": ("query", QUERY_NAMES),
    "sentencekv_head_reduce": ("reduce", REDUCE_NAMES),
    "sentencekv_retention": ("retention", None),  # a number
    "sentencekv_estimate": ("estimate", {"on": True, "off": False}),
}
"""Parts of the policy by option; they are there to compare rankings on one server."""
RULES: dict[str, Mapping[str, Any]] = {f.name: f.metadata for f in fields(SentenceKVConfig)}
"""Of the server's settings: a request's numbers have the bounds of the setting they stand for."""
KEYS = (SWITCH, POLICY, BUDGET, *RANKING)


class RequestOptionsError(ValueError):
    """An override cannot be honoured; the message holds rule, value and the smallest fix."""


@dataclass(frozen=True)
class RequestOptions:
    """How one request asks to be decoded."""

    enabled: bool  # False: dense for good
    policy: SelectionPolicy
    budget_blocks: int  # history blocks per KV head and step
    layer_blocks: tuple[int, ...] = ()  # `budget_blocks` by layer; (): the same in all

    @classmethod
    def parse(
        cls, extra_args: Mapping[str, Any] | None, resolved: ResolvedConfig
    ) -> RequestOptions:
        """The server's settings with the request's overrides; keys of others are ignored.

        Raises:
            RequestOptionsError: unknown key, value out of range, or more than the working
                set holds.
        """
        given = _ours(extra_args)
        for key in given:
            if key not in KEYS:
                raise RequestOptionsError(f"unknown option {shown(key)}: {closest(key, KEYS)}")
        enabled = _switch(given.get(SWITCH, "on"))
        policy = _policy(given[POLICY], resolved) if POLICY in given else resolved.policy
        policy = _ranking(policy, {k: v for k, v in given.items() if k in RANKING})
        _check_index(policy, resolved)
        _check_window(policy, resolved)
        budget = _budget(given[BUDGET]) if BUDGET in given else resolved.config.token_budget
        if policy.selects:
            _check_fit(budget, resolved)
        history = resolved.history_blocks(policy, budget)
        by_layer = resolved.layer_blocks(policy, history)
        return cls(enabled, policy, history, by_layer)


def _ours(extra_args: Any) -> dict[str, Any]:
    """The options that are meant for us; what is no mapping of names has none."""
    if not isinstance(extra_args, Mapping):
        return {}
    return {k: v for k, v in extra_args.items() if isinstance(k, str) and k.startswith(SWITCH)}


def _switch(value: Any) -> bool:
    if isinstance(value, str) and value in ("on", "off"):
        return value == "on"
    raise RequestOptionsError(f'{SWITCH} is "on" or "off", got {shown(value)}')


def _policy(name: Any, resolved: ResolvedConfig) -> SelectionPolicy:
    if isinstance(name, str) and name == resolved.policy.name:
        return resolved.policy
    if not isinstance(name, str) or name not in POLICIES:
        raise RequestOptionsError(
            f"{POLICY} {shown(name)} is not known: {closest(name, tuple(POLICIES))}"
        )
    return POLICIES[name]


def _ranking(policy: SelectionPolicy, given: Mapping[str, Any]) -> SelectionPolicy:
    if given and policy.index is None:
        raise RequestOptionsError(
            f"policy {policy.name!r} ranks nothing, so {', '.join(given)} cannot apply: remove "
            f"{'it' if len(given) == 1 else 'them'}"
        )
    changes: dict[str, Any] = {}
    for key, value in given.items():
        field, names = RANKING[key]
        if names is None:
            changes[field] = _number(key, value, RULES[field])
        elif isinstance(value, str) and value in names:
            changes[field] = names[value]
        else:
            known = closest(value, [*names])
            raise RequestOptionsError(f"{key} {shown(value)} is not known: {known}")
    return replace(policy, **changes)


def _check_index(policy: SelectionPolicy, resolved: ResolvedConfig) -> None:
    index = policy.index
    if (conflict := policy.codes_conflict) is not None:
        raise RequestOptionsError(conflict)
    if index is IndexKind.TOKEN_CODES and not resolved.code_width:
        raise RequestOptionsError(
            f"policy {policy.name!r} ranks by token codes, which this server does not keep: start "
            "it with index_codes of true"
        )
    if (conflict := policy.estimate_conflict) is not None:
        raise RequestOptionsError(f"{conflict}: set sentencekv_estimate to 'off'")
    if index is not None and policy.vectors > resolved.index_vectors:
        raise RequestOptionsError(
            f"policy {policy.name!r} with index {index.name.lower()!r}"
            f"{' and estimate' * policy.estimate} keeps {policy.vectors} "
            f"vectors a row, this server has room for {resolved.index_vectors}: start it with "
            f"index_vectors of {policy.vectors}"
        )


def _check_window(policy: SelectionPolicy, resolved: ResolvedConfig) -> None:
    settlement = policy.settlement
    if settlement is not None and settlement.window > resolved.observation_window:
        raise RequestOptionsError(
            f"policy {policy.name!r} votes with the last {settlement.window} prompt tokens, "
            f"this server keeps the queries of {resolved.observation_window}: start it with "
            f"observation_window of {settlement.window}"
        )


def _number(key: str, value: Any, rule: Mapping[str, Any]) -> float:
    if type(value) not in (int, float):
        raise RequestOptionsError(f"{key} is a number, got {shown(value)}")
    if error := range_error(key, value, rule["low"], rule["high"], rule["above"]):
        raise RequestOptionsError(error)
    return float(value)


def _budget(value: Any) -> int:
    # Some clients send strings only; ten digits are enough, and Python reads no 4,301 of them.
    if isinstance(value, str) and value.isdecimal() and len(value) <= 10:
        value = int(value)
    if type(value) is not int:
        raise RequestOptionsError(
            f"{BUDGET} is a whole number of tokens up to {MAX_TOKENS}, got {shown(value)}"
        )
    rule = RULES["token_budget"]
    if error := range_error(BUDGET, value, rule["low"], rule["high"]):
        raise RequestOptionsError(error)
    return value


def _check_fit(budget: int, resolved: ResolvedConfig) -> None:
    config = resolved.config
    if resolved.largest_budget < resolved.smallest_budget:
        raise RequestOptionsError(
            "this policy swaps history in, but the server has no working set: start it with "
            f"working_set_tokens of at least {resolved.block_size}"
        )
    if budget < resolved.smallest_budget:
        raise RequestOptionsError(
            f"{BUDGET} {budget} is below num_sink_tokens {config.num_sink_tokens} + "
            f"recent_window {config.recent_window} + one block of {resolved.block_size}: "
            f"the smallest budget is {resolved.smallest_budget}"
        )
    if budget > resolved.largest_budget:
        raise RequestOptionsError(
            f"{BUDGET} {budget} is above what this server's working set of "
            f"{resolved.working_set_blocks} blocks holds: the largest budget is "
            f"{resolved.largest_budget}"
        )
