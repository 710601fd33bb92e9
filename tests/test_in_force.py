# SPDX-License-Identifier: Apache-2.0
"""A server says what it runs with, and a preset may be named among the settings."""

from __future__ import annotations

import pytest

from sentencekv_vllm.config import ConfigError, SentenceKVConfig
from sentencekv_vllm.in_force import in_force
from sentencekv_vllm.presets import load_preset, preset_paths, with_preset
from sentencekv_vllm.resolved import resolve

MODEL = {"block_size": 32, "num_kv_heads": 2, "head_dim": 64, "num_layers": 4, "dtype_size": 2}


def line(**settings):
    return in_force(resolve(SentenceKVConfig.from_dict(with_preset(settings)), **MODEL))


def test_the_line_has_policy_budget_segmenter_and_pool():
    text = line()
    for words in ("policy sentencekv", "token_budget 512 (11 blocks of 32", "segmenter auto",
                  "swap pool 4.00 GiB", "tokens, when full: dense, index ",
                  "not at their defaults: none"):  # fmt: skip
        assert words in text
    assert "\n" not in text


def test_the_line_has_every_setting_that_was_changed():
    text = line(policy="streaming", warm_start=True, min_context_tokens=512)
    assert text.endswith("policy='streaming', min_context_tokens=512, warm_start=True")


@pytest.mark.parametrize("name", sorted(preset_paths()))
def test_settings_are_merged_over_the_preset_that_they_name(name):
    config = SentenceKVConfig.from_dict(with_preset({"preset": name, "host_pool_gib": 3.25}))
    assert config == SentenceKVConfig.from_dict({**vars(load_preset(name)), "host_pool_gib": 3.25})


@pytest.mark.parametrize("name", ["qualty", 3, ["default"], None, {"a": 1}])
def test_an_unknown_preset_is_refused(name):
    with pytest.raises(ConfigError, match="unknown preset"):
        with_preset({"preset": name})


@pytest.mark.parametrize("values", [{}, [], 3, {"policy": "full"}])
def test_settings_without_a_preset_stay_as_they_are(values):
    assert with_preset(values) == values
