# SPDX-License-Identifier: Apache-2.0
"""Configuration files that we write or recommend, as vLLM reads and settles them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

pytest.importorskip("vllm", reason="vLLM is not installed")

from sentencekv_vllm.config import SentenceKVConfig  # noqa: E402
from sentencekv_vllm.plan.machine import GIB, Machine  # noqa: E402
from sentencekv_vllm.plan.making import make_plan  # noqa: E402
from sentencekv_vllm.plan.model_shape import read_model  # noqa: E402
from sentencekv_vllm.plan.recommendation import arguments, as_yaml  # noqa: E402
from sentencekv_vllm.presets import PACKAGE  # noqa: E402

MODEL = str(PACKAGE / "assets" / "tiny-recall")
DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def written(name: str) -> str:
    """Of compose.yaml, and in the ConfigMap of kubernetes.yaml."""
    if name == "compose":
        return (DEPLOY / "serve.yaml").read_text()
    first = next(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    return first["data"]["serve.yaml"]


def parsed(file: Path):
    """Arguments of the engine, as `vllm serve --config FILE` has them."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    given = parser.parse_args(["--model", MODEL, "--config", str(file)])
    return AsyncEngineArgs.from_cli_args(given)


def test_vllm_settles_a_recommended_configuration_as_planned(tmp_path):
    from sentencekv_vllm.vllm_glue.setup import resolved_config
    from sentencekv_vllm.vllm_glue.visit_room import blocks_for

    machine = Machine(GIB, GIB, kv_cache_bytes=GIB // 4, chunk_tokens=1024)
    plan = make_plan(read_model(MODEL, "auto"), machine, 16384, SentenceKVConfig(), 32)
    file = tmp_path / "serve.yaml"
    file.write_text(as_yaml(plan))
    config = parsed(file).create_engine_config()
    assert config.attention_config.backend.name == "SENTENCEKV"
    assert resolved_config(config) == plan.resolved
    assert config.scheduler_config.max_num_seqs == arguments(plan)["max-num-seqs"]
    assert config.model_config.max_model_len == 16384
    here = replace(  # planned for a GPU
        machine, staging_halves=1, batches_in_flight=config.max_concurrent_batches
    )
    need = make_plan(plan.model, here, 16384, plan.resolved.config, 32, pool_is_given=True).need
    assert need.prefill_blocks == blocks_for(config, plan.resolved, 16384)


@pytest.mark.parametrize("name", ["compose", "kubernetes"])
def test_vllm_reads_the_files_of_deployments(tmp_path, name):
    file = tmp_path / "serve.yaml"
    file.write_text(written(name))
    read, given = parsed(file), yaml.safe_load(written(name))
    assert {n: getattr(read, n.replace("-", "_")) for n in given} == given
