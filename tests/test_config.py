# SPDX-License-Identifier: Apache-2.0
"""Settings: what is accepted, what is refused and how, and the sizes that follow."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sentencekv_vllm.config import ConfigError, SentenceKVConfig
from sentencekv_vllm.host_format import HOST_DTYPES
from sentencekv_vllm.policies import POLICIES
from sentencekv_vllm.presets import load_preset, preset_path, preset_paths
from sentencekv_vllm.resolved import GIB, ResolvedConfig, resolve
from sentencekv_vllm.types import Geometry, IndexKind, Reduce
from sentencekv_vllm.worker.pools import Pools

MODEL = {"num_kv_heads": 2, "head_dim": 64, "num_layers": 4, "dtype_size": 2}


def sizes(block_size: int = 32, **settings: object) -> ResolvedConfig:
    config = SentenceKVConfig.from_dict(settings)
    return resolve(config, block_size=block_size, **MODEL)


def test_nothing_typed_means_the_defaults():
    assert SentenceKVConfig.from_dict({}) == SentenceKVConfig()
    assert SentenceKVConfig().selection_policy == POLICIES["sentencekv"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"token_bugdet": 512}, ["token_bugdet", "did you mean 'token_budget'?"]),
        ({"zzz": 1}, ["zzz", "use one of policy, token_budget"]),
        ({"policy": "sentenckv"}, ["policy", "did you mean 'sentencekv'?"]),
        ({"policy": 3}, ["policy", "str", "3 (int)"]),
        ({"token_budget": "512"}, ["token_budget", "int", "'512' (str)"]),
        ({"token_budget": 512.0}, ["token_budget", "int", "512.0 (float)"]),
        ({"token_budget": True}, ["token_budget", "int", "True (bool)"]),
        ({"token_budget": None}, ["token_budget", "int", "None"]),
        ({"token_budget": 0}, ["token_budget", "at least 1", "got 0"]),
        ({"num_sink_tokens": -1}, ["num_sink_tokens", "at least 0", "got -1"]),
        ({"recent_window": 0}, ["recent_window", "at least 1"]),
        ({"working_set_tokens": "auto"}, ["working_set_tokens", "int or null", "'auto'"]),
        ({"host_pool_gib": 0}, ["host_pool_gib", "greater than 0"]),
        ({"host_pool_gib": float("inf")}, ["host_pool_gib", "finite", "inf"]),
        ({"host_pool_gib": 1e300}, ["host_pool_gib", "at most 65536", "1e+300"]),
        ({"host_pool_gib": 10**400}, ["host_pool_gib", "at most 65536", "401 digits"]),
        ({"token_budget": 2**31}, ["token_budget", "at most 16777216", "2147483648"]),
        ({"token_budget": "5" * 5000}, ["token_budget must be int"]),
        ({"retention": 1e39}, ["retention", "at most 10000", "1e+39"]),
        ({"retention": float("nan")}, ["retention", "finite", "nan"]),
        ({"stay_dense_when_covered": 1}, ["stay_dense_when_covered", "bool", "1 (int)"]),
        ({"segmenter": "nltk"}, ["segmenter", "nltk", "auto, spacy, punctuation, fixed"]),
        ({"on_pool_full": "drop"}, ["on_pool_full", "dense, wait"]),
        ({"index": "token_code"}, ["index", "did you mean 'token_codes'?"]),
        ({"grouping": "sentences"}, ["'token_codes' ranks blocks", "grouping to 'blocks'"]),
        ({"head_reduce": "max"}, ["by probability", "head_reduce to 'softmax_mean'"]),
        ({"index_codes": False}, ["'sentencekv'", "index_codes is false", "remove it"]),
        ({"head_reduce": "sum"}, ["head_reduce", "softmax_mean, max, mean"]),
        (
            {"min_sentence_tokens": 80},
            ["max_sentence_tokens 64", "min_sentence_tokens 80", "raise it to 160"],
        ),
        ({"host_kv_dtype": "int2"}, ["host_kv_dtype", "did you mean 'int8'?"]),
        ({"host_kv_dtype": 8}, ["host_kv_dtype", "str", "8 (int)"]),
        ({"grouping": "block"}, ["grouping", "did you mean 'blocks'?"]),
        ({"index_vectors": 3}, ["index_vectors", "at most 2", "got 3"]),
        ({"observation_window": 8, "policy": "snapkv"}, ["'snapkv'", "last 32", "set it to 32"]),
        ({"index_vectors": 1, "policy": "quest"}, ["'bounds'", "2 vectors", "set it to 2"]),
        ({"index_vectors": 1, "estimate": True}, ["with estimate", "2 vectors", "set it to 2"]),
        ({"estimate": 1}, ["estimate", "bool or null", "1 (int)"]),
        ({"policy": "quest", "estimate": True}, ["'bounds'", "mean values", "estimate to false"]),
        ({"policy": "snapkv", "estimate": True}, ["'snapkv'", "estimate"]),
        ({"policy": "sentencekv-pool", "estimate": True}, ["elected tokens", "to false"]),
        ({"policy": "full", "retention": 1.0}, ["'full'", "retention", "remove it"]),
        (
            {"policy": "streaming", "index": "centroid", "query": "current"},
            ["'streaming'", "index, query", "remove them"],
        ),
        (
            {"min_context_tokens_with_room": 4096},
            ["min_context_tokens_with_room 4096", "min_context_tokens 8192", "raise it"],
        ),
    ],
    ids=lambda value: None if isinstance(value, list) else repr(value),
)
def test_a_bad_setting_is_refused_with_rule_value_and_fix(settings, words):
    with pytest.raises(ConfigError) as caught:
        SentenceKVConfig.from_dict(settings)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("values", [[], "policy", 7])
def test_settings_that_are_no_mapping_are_refused(values):
    with pytest.raises(ConfigError, match="must be a mapping"):
        SentenceKVConfig.from_dict(values)


def test_every_number_is_bounded_in_the_type_that_it_ends_up_in():
    for f in fields(SentenceKVConfig):
        if not f.metadata or f.metadata["choices"] or str(f.type).startswith("bool"):
            continue
        bounds = f.metadata["low"], f.metadata["above"]
        assert f.metadata["high"] <= 2**24, f"{f.name} is exact as float32 and as int32"
        assert max(bounds) >= 0, f"{f.name} is not negative"


def test_pages_are_counted_by_int32():
    """Rows, sixteen a page of sixteen tokens, have ids of 32 bits: 2^27 pages."""
    with pytest.raises(ConfigError, match="65536 holds .* pages .* the largest pool is 127 GiB"):
        resolve(
            SentenceKVConfig(host_pool_gib=65536),
            block_size=16,
            num_kv_heads=1,
            head_dim=16,
            num_layers=1,
            dtype_size=2,
        )


def test_direct_construction_is_checked_too():
    with pytest.raises(ConfigError, match="token_budget"):
        SentenceKVConfig(token_budget=-5)


def test_an_int_is_accepted_where_a_float_is_wanted():
    assert SentenceKVConfig.from_dict({"host_pool_gib": 2}).host_pool_gib == 2


def test_overrides_replace_the_policys_parts_and_nothing_else():
    config = SentenceKVConfig(index="centroid", grouping="blocks", head_reduce="max", retention=0.0)
    policy = config.selection_policy
    assert policy.grouping == "blocks"
    assert (policy.index, policy.reduce, policy.retention) == (IndexKind.CENTROID, Reduce.MAX, 0.0)
    assert (policy.name, policy.query) == ("sentencekv", POLICIES["sentencekv"].query)


@pytest.mark.parametrize("name", sorted(preset_paths()))
def test_every_preset_is_valid_and_fits_an_8b_model(name):
    config = load_preset(name)
    resolve(config, block_size=32, num_kv_heads=8, head_dim=128, num_layers=32, dtype_size=2)


def test_the_default_preset_spells_out_the_defaults():
    assert load_preset("default") == SentenceKVConfig()
    written = yaml.safe_load(preset_path("default").read_text())["additional-config"]["sentencekv"]
    policys_own = {"index", "grouping", "query", "head_reduce", "retention"}
    policys_own |= {"layer_weights"}
    policys_own |= {"estimate"}
    assert set(written) == {f.name for f in fields(SentenceKVConfig)} - policys_own


def test_an_unknown_preset_is_refused_by_name():
    with pytest.raises(ConfigError, match="did you mean 'quality'"):
        preset_path("qualty")


def test_sizes_of_the_defaults():
    resolved = sizes()
    assert (resolved.sink_blocks, resolved.recent_blocks) == (1, 4)
    assert resolved.budget_blocks == 11  # 512 - 32 - 128 = 352 tokens
    assert resolved.working_set_blocks == 14
    assert resolved.resident_blocks == 1 + 14 + 4 + 1
    assert (resolved.smallest_budget, resolved.largest_budget) == (192, 160 + 14 * 32)


@given(
    block_size=st.sampled_from([16, 32, 128]),
    sinks=st.integers(0, 300),
    recent=st.integers(1, 300),
    history=st.integers(128, 4000),
)
def test_budget_covers_what_was_asked_and_less_than_a_block_more(
    block_size, sinks, recent, history
):
    resolved = sizes(
        block_size,
        token_budget=sinks + recent + history,
        num_sink_tokens=sinks,
        recent_window=recent,
    )
    assert 0 <= resolved.budget_blocks * block_size - history < block_size
    assert resolved.working_set_blocks >= resolved.budget_blocks
    assert 0 <= resolved.sink_blocks * block_size - sinks < block_size
    assert 0 <= resolved.recent_blocks * block_size - recent < block_size


@given(st.floats(0.1, 3.0), st.sampled_from([16, 32, 128]))
def test_the_pool_never_exceeds_what_was_given(gib, block_size):
    resolved = sizes(block_size, host_pool_gib=gib, min_context_tokens=512)
    assert 0 <= gib * GIB - resolved.host_pool_bytes < resolved.page_bytes + 1


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_has_a_preset_of_its_name(name):
    assert load_preset(name).selection_policy == POLICIES[name]


def test_room_for_two_vectors_is_made_where_it_is_needed_or_asked_for():
    assert [sizes(policy=name).index_vectors for name in POLICIES] == [
        0 if policy.index is None else policy.vectors for policy in POLICIES.values()
    ]
    paper, quest = sizes(policy="sentencekv-paper"), sizes(policy="quest")
    assert (sizes().index_vectors, paper.index_vectors, quest.index_vectors) == (0, 1, 2)
    assert sizes(estimate=True).index_vectors == sizes(policy="retroinfer").index_vectors == 2
    assert sizes(policy="retroinfer", estimate=False).index_vectors == 1
    assert sizes(policy="streaming", index_vectors=2).index_bytes == quest.index_bytes
    head_blocks = MODEL["num_layers"] * MODEL["num_kv_heads"]
    vector = 2 * MODEL["head_dim"] * paper.rows_per_page * head_blocks
    assert quest.index_page_bytes - paper.index_page_bytes == vector


def test_codes_are_kept_where_they_are_read_or_asked_for():
    assert sizes().code_width == 64  # two bits of half of 64 channels
    assert sizes(policy="quest").code_width == sizes(policy="snapkv").code_width == 0
    assert sizes(policy="snapkv").index_bytes == 0
    both = sizes(policy="quest", index_codes=True)
    assert (
        both.index_page_bytes == sizes().index_page_bytes + sizes(policy="quest").index_page_bytes
    )


def test_the_index_of_an_8b_model_is_less_than_a_twentieth_of_its_kv():
    """docs/memory_layout.md; head_dim 128, blocks of 32."""
    shape = {"num_kv_heads": 8, "head_dim": 128, "num_layers": 32, "dtype_size": 2}
    for settings, most in (({}, 0.045), ({"index_share": 0.25}, 0.03)):
        config = SentenceKVConfig.from_dict(settings)
        resolved = resolve(config, block_size=32, **shape)
        assert resolved.index_page_bytes < most * resolved.page_bytes


@pytest.mark.parametrize(
    ("share", "channels"), [(0.01, 8), (0.2, 8), (0.25, 16), (0.4, 24), (0.5, 32), (1, 64)]
)
def test_a_share_of_the_channels_is_whole_bytes(share, channels):
    assert sizes(index_share=share).code_channels == channels  # of 64
    assert sizes(index_share=share).code_width == 2 * channels
    assert sizes(index_share=share, index_bits=1).code_width == channels


@pytest.mark.parametrize("index_share", [0.5, 0.375])
@pytest.mark.parametrize("host_kv_dtype", HOST_DTYPES)
@pytest.mark.parametrize("index_vectors", [0, 1, 2])
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_announced_bytes_are_the_bytes_allocated(
    block_size, index_vectors, host_kv_dtype, index_share
):
    resolved = sizes(
        block_size,
        host_pool_gib=0.01,
        min_context_tokens=256,
        index_vectors=index_vectors,
        index_share=index_share,
        host_kv_dtype=host_kv_dtype,
    )
    geometry = Geometry(
        num_layers=4,
        num_kv_heads=2,
        group_size=2,
        head_dim=64,
        block_size=block_size,
        rows_per_page=resolved.rows_per_page,
        scale=0.125,
        vectors_per_row=resolved.index_vectors,
        code_width=resolved.code_width,
        host_format=resolved.host_format,
    )
    caches = [torch.empty(3, 2, block_size, 128, dtype=torch.bfloat16) for _ in range(4)]
    pools = Pools(geometry, resolved.num_pages, caches)
    assert resolved.host_pool_bytes == pools.host_bytes
    assert resolved.page_bytes == pools.page_bytes == 4 * 2 * pools.head_block_bytes
    assert resolved.index_bytes == pools.index_bytes


@pytest.mark.parametrize(
    ("host_kv_dtype", "times"), [("int8", 1.88), ("fp8", 1.93), ("int4", 3.55)]
)
def test_a_pool_of_lower_precision_holds_more_tokens(host_kv_dtype, times):
    assert sizes(host_kv_dtype=host_kv_dtype).num_pages > times * sizes().num_pages


def test_host_formats_need_head_dims_that_groups_divide():
    model = MODEL | {"head_dim": 80}
    resolve(SentenceKVConfig(), block_size=32, **model)
    config = SentenceKVConfig(host_kv_dtype="int4")
    with pytest.raises(ConfigError, match="head_dim 80 is no multiple of 32: set .* 'auto'"):
        resolve(config, block_size=32, **model)


@pytest.mark.parametrize(
    ("settings", "smallest"),
    [
        ({"token_budget": 191}, {"token_budget": 192}),
        ({"working_set_tokens": 320}, {"working_set_tokens": 352}),
        ({"host_pool_gib": 0.01}, {"host_pool_gib": 0.02}),
    ],
    ids=str,
)
def test_the_fix_that_the_error_names_is_enough(settings, smallest):
    (value,) = smallest.values()
    with pytest.raises(ConfigError, match=f"smallest .* {value}"):
        sizes(**settings)
    assert sizes(**smallest)


@pytest.mark.parametrize("policy", ["full", "streaming"])
def test_policies_that_rank_nothing_need_no_budget(policy):
    resolved = sizes(policy=policy, token_budget=1, working_set_tokens=640)
    assert resolved.budget_blocks == (20 if policy == "full" else 0)


def test_a_head_dim_that_cannot_be_packed_is_refused():
    with pytest.raises(ConfigError, match="head_dim 60"):
        resolve(
            SentenceKVConfig(),
            block_size=32,
            num_kv_heads=2,
            head_dim=60,
            num_layers=4,
            dtype_size=2,
        )
