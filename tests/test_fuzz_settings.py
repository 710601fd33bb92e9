# SPDX-License-Identifier: Apache-2.0
"""Settings and request options from anywhere: accepted, or refused by name, never anything else.

`SENTENCEKV_FUZZ_EXAMPLES` sets the number of examples of each test.
"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sentencekv_vllm.config import ConfigError, SentenceKVConfig
from sentencekv_vllm.request_options import KEYS, RequestOptions, RequestOptionsError
from sentencekv_vllm.resolved import resolve

EXAMPLES = int(os.environ.get("SENTENCEKV_FUZZ_EXAMPLES", "150"))
FIELDS = {f.name: f for f in fields(SentenceKVConfig)}
MODELS = [
    {"block_size": 16, "num_kv_heads": 1, "head_dim": 64, "num_layers": 1, "dtype_size": 2},
    {"block_size": 32, "num_kv_heads": 8, "head_dim": 128, "num_layers": 32, "dtype_size": 2},
    {"block_size": 128, "num_kv_heads": 2, "head_dim": 80, "num_layers": 3, "dtype_size": 4},
]
HUGE = [10**4, 10**18, 10**400, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**63, 2**128]
UNPRINTABLE = 5000  # digits: Python refuses to print, and hypothesis cannot list, such a number
TINY = [5e-324, 1e-40, 1e-300, 1e39, 1e300, 3.5e38, float("inf"), float("-inf"), float("nan")]

numbers = st.one_of(
    st.integers(-3, 200),
    st.integers(),
    st.sampled_from([*HUGE, *(-n for n in HUGE)]),
    st.sampled_from([*TINY, *(-n for n in TINY)]),
    st.just(UNPRINTABLE).map(lambda digits: 10**digits),
    st.floats(),
    st.floats(0, 8),
)
texts = st.one_of(
    st.text(max_size=8),  # surrogates, too
    st.text("0123456789", min_size=1, max_size=12),
    st.sampled_from(["", "٣", "²", "9" * 5000, "x" * 100_000, "\0", "on", "off", "None", "\ud800"]),
)
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
json_values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


def fitting(name: str) -> st.SearchStrategy[Any]:
    """Values from within a setting's schema."""
    rule, default = FIELDS[name].metadata, FIELDS[name].default
    if name == "layer_weights":
        return st.lists(st.floats(0.5, 1.5), max_size=5)
    if rule["choices"]:
        return st.sampled_from(rule["choices"])
    if isinstance(default, bool) or name == "estimate":
        return st.booleans()
    low = max(rule["low"], rule["above"], 0)
    if isinstance(default, float) or name == "retention":
        return st.floats(low, rule["high"])
    return st.one_of(
        st.integers(int(low), int(rule["high"])), st.integers(int(low), min(int(rule["high"]), 99))
    )


@st.composite
def some_settings(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=6, unique=True))
    given_values = {n: draw(st.one_of(fitting(n), fitting(n), json_values)) for n in names}
    if draw(st.integers(0, 9)) == 0:
        given_values[draw(texts)] = draw(json_values)
    return given_values


def check_derived(resolved: Any) -> None:
    """Sizes that tables on the device hold as int32."""
    assert resolved.num_pages * resolved.rows_per_page < 2**31
    assert 0 <= resolved.budget_blocks <= resolved.working_set_blocks < 2**31
    assert np.isfinite(np.float32(resolved.policy.retention))


relaxed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@relaxed
@given(values=some_settings(), model=st.sampled_from(MODELS))
def test_any_settings_are_served_or_refused_by_name(values, model):
    try:
        resolved = resolve(SentenceKVConfig.from_dict(values), **model)
    except ConfigError as error:
        assert len(str(error)) < 2000
        str(error).encode()  # it can be sent and printed
    else:
        check_derived(resolved)


@relaxed
@given(values=json_values)
def test_anything_in_place_of_settings_is_refused_by_name(values):
    try:
        SentenceKVConfig.from_dict(values)
    except ConfigError as error:
        str(error).encode()
    else:
        assert values == {}


SERVERS = [
    resolve(SentenceKVConfig.from_dict(values), **MODELS[1])
    for values in (
        {},
        {"index_vectors": 2, "observation_window": 32, "retention": 0},
        {"policy": "streaming", "working_set_tokens": 0},
        {"policy": "full", "layer_share": 3},
    )
]


def option_values(key: str) -> st.SearchStrategy[Any]:
    name = key.removeprefix("sentencekv_").removeprefix("sentencekv")
    known = (
        fitting(name) if name in FIELDS and name != "estimate" else st.sampled_from(["on", "off"])
    )
    return st.one_of(known, known, json_values, st.integers(192, 1248))


@st.composite
def some_options(draw: st.DrawFn) -> Any:
    if draw(st.integers(0, 19)) == 0:
        return draw(json_values)
    keys = draw(st.lists(st.sampled_from(KEYS), max_size=4, unique=True))
    options = {key: draw(option_values(key)) for key in keys}
    if draw(st.integers(0, 9)) == 0:
        options["sentencekv" + draw(texts)] = draw(json_values)
    if draw(st.integers(0, 9)) == 0:
        options[draw(st.one_of(texts, st.integers()))] = draw(json_values)
    return options


@relaxed
@given(options=some_options(), server=st.sampled_from(SERVERS))
def test_any_request_options_are_served_or_refused_by_name(options, server):
    try:
        wanted = RequestOptions.parse(options, server)
    except RequestOptionsError as error:
        assert len(str(error)) < 2000
        str(error).encode()
    else:
        assert np.isfinite(np.float32(wanted.policy.retention))
        assert 0 <= wanted.budget_blocks <= server.working_set_blocks
        assert all(1 <= n <= server.working_set_blocks for n in wanted.layer_blocks)


@pytest.mark.parametrize(
    "value", [*HUGE, 10**UNPRINTABLE, *TINY], ids=lambda v: f"{type(v).__name__}"
)
@pytest.mark.parametrize("key", KEYS)
def test_the_largest_and_smallest_numbers_of_every_option(key, value):
    for server in SERVERS:
        try:
            wanted = RequestOptions.parse({key: value}, server)
        except RequestOptionsError:
            continue
        assert np.isfinite(np.float32(wanted.policy.retention))
