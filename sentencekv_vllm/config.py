# SPDX-License-Identifier: Apache-2.0
"""What the user typed: `additional_config["sentencekv"]`, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, get_args, get_type_hints

from .bounds import MAX_POOL_GIB, MAX_RETENTION, MAX_TOKENS, range_error, shown
from .host_format import HOST_DTYPES
from .layer_budgets import weights_error
from .policies import POLICIES, Grouping, SelectionPolicy
from .types import IndexKind, QueryKind, Reduce

INDEX_NAMES = {kind.name.lower(): kind for kind in IndexKind}
QUERY_NAMES = {query.name.lower(): query for query in QueryKind}
REDUCE_NAMES = {reduce.name.lower(): reduce for reduce in Reduce}


class ConfigError(ValueError):
    """A setting breaks a rule; the message holds rule, values and the smallest fix."""


def closest(name: object, known: Sequence[str]) -> str:
    """A hint for a misspelt name: the closest known one, or all of them."""
    text = name[:64] if isinstance(name, str) else shown(name)  # searching takes its square
    near = get_close_matches(text, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(known)}"


def _option(
    default: Any,
    *,
    low: float = -math.inf,
    high: float = MAX_TOKENS,
    above: float = -math.inf,
    choices: Sequence[str] = (),
) -> Any:
    """A field with its rule: from `low` to `high`, greater than `above`, one of `choices`.

    Every number has a `high`: one of tokens, unless its field says otherwise.
    """
    rule = {"low": low, "high": high, "above": above, "choices": choices}
    return field(default=default, metadata=rule)


@dataclass(frozen=True)
class SentenceKVConfig:
    """Settings of the backend. Token counts are tokens of one request.

    Raises:
        ConfigError: wrong type, out of range, or settings that contradict each other.
    """

    policy: str = _option("sentencekv", choices=tuple(POLICIES))
    token_budget: int = _option(512, low=1)
    """Tokens attended per KV head and step, sinks and recent window included."""
    num_sink_tokens: int = _option(32, low=0)
    """First tokens, always attended."""
    recent_window: int = _option(128, low=1)
    """Last tokens, always attended."""
    working_set_tokens: int | None = _option(None, low=0)
    """GPU room for swapped-in history, per sparse request; None: a quarter more than the
    history part of the largest layer's budget. It changes the speed, never the output, unless
    `layer_weights` ask a layer for more."""
    host_pool_gib: float = _option(4.0, above=0, high=MAX_POOL_GIB)
    """Swap pool of one worker in host memory; the index on the device grows with it."""
    host_kv_dtype: str = _option("auto", choices=tuple(HOST_DTYPES))
    """Precision of the swap pool; `auto` is that of the KV cache. Others hold more tokens, swap
    fewer bytes and make what is swapped in approximate."""
    min_context_tokens: int = _option(8192, low=1)
    """Shorter requests stay dense."""
    min_context_tokens_with_room: int | None = _option(None, low=1)
    """Requests shorter than this stay dense, too, until GPU blocks run short: dense steps may be
    the faster ones up to there. None: they do not. Which tokens are then generated depends on
    what else is served."""

    segmenter: str = _option("auto", choices=("auto", "spacy", "punctuation", "fixed"))
    min_sentence_tokens: int = _option(4, low=1)
    max_sentence_tokens: int = _option(64, low=1)
    fixed_sentence_tokens: int = _option(32, low=1)
    """Length of every sentence of the `fixed` segmenter."""
    sentence_tokens_per_row: int = _option(16, low=1)
    """Mean sentence length that the room for centroids is planned for; shorter sentences take
    more pages."""

    on_pool_full: str = _option("dense", choices=("dense", "wait"))
    """Without host pages: what has none stays on the GPU, or the request waits for admission."""
    visits: bool = _option(True)
    """A prompt that does not fit on the GPU is prefilled all the same: its history waits in the
    swap pool and visits the GPU, one layer at a time, for each chunk. False: it is refused."""
    stay_dense_when_covered: bool = _option(True)
    """False: a history that the budget covers runs through the sparse path all the same,
    which shows that the path is exact."""
    warm_start: bool = _option(False)
    """Swap in what the prompt's last token would select before a request's first sparse step. It
    changes the speed, never the output."""
    cuda_graphs: bool = _option(True)
    """Record what a sparse step does in CUDA graphs; False launches every kernel from Python."""
    allow_untested_vllm: bool = _option(False)

    index_vectors: int | None = _option(None, low=0, high=2)
    """Vectors a sentence row has room for. 1 lets requests ask for the policies that rank by mean
    keys, 2 for `quest`, `mean-std` and `retroinfer`, too, or to estimate; None: what the server's
    own policy needs."""

    index_codes: bool | None = _option(None)
    """Whether tokens' codes are kept, by which `sentencekv` ranks; None: where the server's own
    policy does."""

    index_share: float = _option(0.5, above=0, high=1)
    """Share of a key's channels that its code has bits for, in steps of 8 channels. Fewer make the
    index smaller and its estimates noisier."""

    index_bits: int = _option(2, low=1, high=2)
    """Bits of a channel's code."""

    calibration: bool = _option(True)
    """Find at start-up in which channels this model's keys and queries differ, once per model;
    False codes keys in a fixed basis."""

    layer_share: int = _option(1, low=1)
    """Consecutive layers that share a selection: the first of them ranks."""

    observation_window: int | None = _option(None, low=0, high=4096)
    """Last prompt tokens whose queries are kept until they have voted; 32 lets requests ask for
    `sentencekv-once`, `sentencekv-pool`, `snapkv`, `pyramidkv`, `chunkkv` and `windowkv`; None:
    what the server's own policy needs."""

    layer_weights: tuple[float, ...] | None = None
    """Parts of the budget that equal shares of the model's depth have, from the first layers to
    the last: up to 4 numbers of mean 1, in place of the policy's own; None keeps them."""

    index: str | None = _option(None, choices=tuple(INDEX_NAMES))
    """With `grouping`, `query`, `head_reduce`, `retention` and `estimate`: in
    place of the policy's own; None keeps it."""
    grouping: str | None = _option(None, choices=get_args(Grouping))
    query: str | None = _option(None, choices=tuple(QUERY_NAMES))
    head_reduce: str | None = _option(None, choices=tuple(REDUCE_NAMES))
    retention: float | None = _option(None, low=0, high=MAX_RETENTION)
    estimate: bool | None = _option(None)
    """What is left out of the history contributes through its groups' mean keys and values."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SentenceKVConfig:
        """Settings by name, as JSON or YAML gives them; missing ones have their default."""
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"sentencekv settings must be a mapping of names to values, got {shown(values)}"
            )
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"unknown setting {shown(name)}: {closest(name, known)}")
        return cls(**values)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        if self.layer_weights is not None:
            object.__setattr__(self, "layer_weights", self._checked_weights())
        for f in fields(self):
            if f.name == "layer_weights":
                continue
            _check(f.name, getattr(self, f.name), hints[f.name], **f.metadata)
        # A sentence one token over the maximum is cut in two: both halves must be long enough.
        if 2 * self.min_sentence_tokens > self.max_sentence_tokens + 1:
            raise ConfigError(
                f"max_sentence_tokens {self.max_sentence_tokens} is below twice "
                f"min_sentence_tokens {self.min_sentence_tokens}: raise it to "
                f"{2 * self.min_sentence_tokens}"
            )
        low, high = self.min_sentence_tokens, self.max_sentence_tokens
        fixed = self.fixed_sentence_tokens
        if self.segmenter == "fixed" and not low <= fixed <= high:
            raise ConfigError(
                f"fixed_sentence_tokens {fixed} lies outside min_sentence_tokens {low} and "
                f"max_sentence_tokens {high}: set it to {min(max(fixed, low), high)}"
            )
        with_room = self.min_context_tokens_with_room
        if with_room is not None and with_room < self.min_context_tokens:
            raise ConfigError(
                f"min_context_tokens_with_room {with_room} is below min_context_tokens "
                f"{self.min_context_tokens}: raise it, or lower min_context_tokens"
            )
        ranking = ("index", "grouping", "query", "head_reduce", "retention")
        overrides = [name for name in (*ranking, "estimate") if getattr(self, name) is not None]
        if overrides and POLICIES[self.policy].index is None:
            raise ConfigError(
                f"policy {self.policy!r} ranks nothing, so {', '.join(overrides)} cannot apply: "
                f"remove {'it' if len(overrides) == 1 else 'them'}"
            )
        policy = self.selection_policy
        if self.layer_weights is not None and not policy.selects:
            raise ConfigError(
                f"policy {self.policy!r} selects nothing, so layer_weights cannot apply: remove it"
            )
        index = policy.index
        if (conflict := policy.codes_conflict) is not None:
            raise ConfigError(conflict)
        if index is IndexKind.TOKEN_CODES and self.index_codes is False:
            raise ConfigError(
                f"policy {self.policy!r} ranks by token codes, index_codes is false: remove it"
            )
        if (conflict := policy.estimate_conflict) is not None:
            raise ConfigError(f"{conflict}: set estimate to false")
        if (
            index is not None
            and self.index_vectors is not None
            and (self.index_vectors < policy.vectors)
        ):
            raise ConfigError(
                f"index {index.name.lower()!r}{' with estimate' * policy.estimate} keeps "
                f"{policy.vectors} vectors a row, index_vectors is {self.index_vectors}: set it to "
                f"{policy.vectors}"
            )

        settlement = POLICIES[self.policy].settlement
        window = self.observation_window
        if settlement is not None and window is not None and window < settlement.window:
            raise ConfigError(
                f"policy {self.policy!r} votes with the last {settlement.window} prompt tokens, "
                f"observation_window is {window}: set it to {settlement.window}"
            )

    def _checked_weights(self) -> tuple[float, ...]:
        weights: Any = self.layer_weights  # a list, as JSON and YAML have it
        if not isinstance(weights, list | tuple):
            raise ConfigError(f"layer_weights must be a list of numbers, got {shown(weights)}")
        error = weights_error(weights)
        if error is not None:
            raise ConfigError(error)
        return tuple(weights)

    @property
    def selection_policy(self) -> SelectionPolicy:
        """The named policy with the overrides applied."""
        changes: dict[str, Any] = {
            "index": None if self.index is None else INDEX_NAMES[self.index],
            "grouping": self.grouping,
            "query": None if self.query is None else QUERY_NAMES[self.query],
            "reduce": None if self.head_reduce is None else REDUCE_NAMES[self.head_reduce],
            "retention": self.retention,
            "layer_weights": self.layer_weights,
            "estimate": self.estimate,
        }
        return replace(POLICIES[self.policy], **{k: v for k, v in changes.items() if v is not None})


def _check(
    name: str,
    value: Any,
    hint: Any,
    low: float,
    high: float,
    above: float,
    choices: Sequence[str],
) -> None:
    kinds = set(get_args(hint) or (hint,))
    if float in kinds:
        kinds.add(int)
    if type(value) not in kinds:  # bool is no number here
        words = " or ".join(sorted("null" if k is type(None) else k.__name__ for k in kinds))
        raise ConfigError(f"{name} must be {words}, got {shown(value)} ({type(value).__name__})")
    if value is None:
        return
    if choices and value not in choices:
        raise ConfigError(f"{name} {shown(value)} is not known: {closest(value, choices)}")
    if isinstance(value, int | float) and (error := range_error(name, value, low, high, above)):
        raise ConfigError(error)
