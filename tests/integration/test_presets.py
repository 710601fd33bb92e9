# SPDX-License-Identifier: Apache-2.0
"""The presets as vLLM's command line reads them."""

from __future__ import annotations

import json

import pytest

from sentencekv_vllm.config import SentenceKVConfig
from sentencekv_vllm.presets import load_preset, preset_path, preset_paths

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("name", sorted(preset_paths()))
def test_vllm_passes_a_presets_settings_on_unchanged(name):
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = FlexibleArgumentParser().load_config_file(str(preset_path(name)))
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert options["--attention-backend"] == "sentencekv"
    settings = json.loads(options["--additional-config"])["sentencekv"]
    assert SentenceKVConfig.from_dict(settings) == load_preset(name)
