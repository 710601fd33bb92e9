# SPDX-License-Identifier: Apache-2.0
"""The backend is known by its name wherever vLLM looks for it, and changes nothing else."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from engine import MODEL, environment  # noqa: E402

from sentencekv_vllm.plugin import register  # noqa: E402


def engine_config(**changes):
    from vllm.engine.arg_utils import EngineArgs

    options = {"model": MODEL, "max_model_len": 4096, "kv_cache_memory_bytes": 1 << 28}
    return EngineArgs(**(options | changes)).create_engine_config()


def test_registering_again_changes_nothing():
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.engine.input_processor import InputProcessor

    def facts():
        platform = type(current_platform)
        return (
            list(AttentionBackendEnum.__members__),
            platform.check_and_update_config.__func__,
            platform.get_attn_backend_cls.__func__,
            InputProcessor._validate_params,
        )

    register()
    once = facts()
    register()
    assert facts() == once and "SENTENCEKV" in once[0]


def test_the_member_unpickles_in_a_process_that_has_loaded_no_plugin():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    members = [AttentionBackendEnum.SENTENCEKV, AttentionBackendEnum.CPU_ATTN]
    command = "import pickle, sys; print(*(m.name for m in pickle.load(sys.stdin.buffer)))"
    result = subprocess.run(
        [sys.executable, "-P", "-c", command],
        input=pickle.dumps(members),
        capture_output=True,
        env=environment(),
        timeout=200,
    )
    names = result.stdout.decode().split()
    assert names == ["SENTENCEKV", "CPU_ATTN"], result.stderr.decode()[-2000:]


def test_members_of_vllm_and_ours_survive_a_round_trip_here():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    for member in (AttentionBackendEnum.SENTENCEKV, AttentionBackendEnum.CPU_ATTN):
        assert pickle.loads(pickle.dumps(member)) is member


@pytest.mark.parametrize("name", ["sentencekv", "SENTENCEKV"])
def test_either_spelling_selects_the_backend_and_brings_its_connector(name):
    config = engine_config(attention_backend=name)
    assert config.attention_config.backend.name == "SENTENCEKV"
    assert config.kv_transfer_config.kv_connector == "SentenceKVConnector"
    assert config.kv_transfer_config.kv_role == "kv_both"
    assert config.cache_config.block_size == 32, "vLLM's 128 makes selection coarse on a CPU"
    assert config.cache_config.enable_prefix_caching


def test_a_block_size_of_the_users_own_stays():
    config = engine_config(attention_backend="sentencekv", block_size=64)
    assert config.cache_config.block_size == 64


def test_without_the_backend_nothing_changes():
    config = engine_config()
    assert config.kv_transfer_config is None
    # vLLM 0.32 settles its 128 here, 0.33 later; ours would be 32.
    assert config.cache_config.block_size in (16, 128)


def test_the_command_line_reads_a_configuration_file(tmp_path):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    file = tmp_path / "serve.yaml"
    settings = {"policy": "random", "token_budget": 512, "min_context_tokens": 600}
    file.write_text(
        f"attention-backend: sentencekv\nmax-model-len: 4096\nadditional-config: "
        f"{json.dumps({'sentencekv': settings})}\n"
    )
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = parser.parse_args(["--model", MODEL, "--config", str(file)])
    config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    assert config.attention_config.backend.name == "SENTENCEKV"
    assert config.additional_config["sentencekv"] == settings


def test_a_wrong_setting_is_refused_at_start_up():
    wrong = {"sentencekv": {"token_budgett": 5}}
    with pytest.raises(ValueError, match="did you mean 'token_budget'"):
        engine_config(attention_backend="sentencekv", additional_config=wrong)
    small = {"sentencekv": {"token_budget": 64}}
    with pytest.raises(ValueError, match="smallest budget is 192"):
        engine_config(attention_backend="sentencekv", additional_config=small)
