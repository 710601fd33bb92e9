# SPDX-License-Identifier: Apache-2.0
"""`sentencekv plan`: sizes are the code's own, and what it counts fits."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sentencekv_vllm import cli
from sentencekv_vllm.config import SentenceKVConfig
from sentencekv_vllm.plan.capacity import Need, dense_requests, sparse_requests
from sentencekv_vllm.plan.error import PlanError
from sentencekv_vllm.plan.machine import GIB, Machine
from sentencekv_vllm.plan.making import make_plan
from sentencekv_vllm.plan.model_shape import ModelShape
from sentencekv_vllm.presets import PACKAGE
from sentencekv_vllm.resolved import resolve

LLAMA = ModelShape("llama-8b", 32, 32, 8, 128, 131072, "bfloat16", 16 * 10**9, False)
MACHINE = Machine(gpu_bytes=80 * GIB, host_bytes=256 * GIB)
TINY = str(PACKAGE / "assets" / "tiny-recall")


def plan(machine=MACHINE, context=131072, model=LLAMA, block_size=32, **settings):
    return make_plan(model, machine, context, SentenceKVConfig(**settings), block_size)


def test_an_8b_llama_has_the_sizes_that_the_documents_name():
    made = plan()
    assert made.kv_token_bytes == 128 * 2**10
    assert made.index_token_bytes / made.kv_token_bytes == pytest.approx(22.2 / 512, abs=1e-4)
    assert made.need == Need(
        dense_blocks=4096, prefill_blocks=774, sparse_blocks=20, host_pages=4096
    )
    assert made.capacity.sparse_requests > 3 * made.capacity.dense_requests > 0


@settings(max_examples=40)
@given(
    gpu=st.integers(24, 200),
    host=st.integers(8, 2000),
    context=st.integers(9000, 131072),
    ranks=st.sampled_from([1, 2, 4, 8]),
    block_size=st.sampled_from([16, 32, 64]),
    dtype=st.sampled_from(["auto", "int8", "int4"]),
)
def test_what_is_planned_fits_and_one_more_would_not(gpu, host, context, ranks, block_size, dtype):
    machine = Machine(gpu * GIB, host * GIB, ranks)
    made = plan(machine, context, block_size=block_size, host_kv_dtype=dtype)
    need, held, n = made.need, made.capacity, made.capacity.sparse_requests
    assert made.host_bytes <= 0.9 * host * GIB
    vllm_takes = machine.gpu_share(made.resolved.index_bytes) * machine.gpu_bytes
    if machine.gpu_share(made.resolved.index_bytes) > 0.01:
        assert vllm_takes + made.resolved.index_bytes <= 0.92 * machine.gpu_bytes * (1 + 1e-9)
    if n:
        assert 1 + need.prefill_blocks + (n - 1) * need.sparse_blocks <= held.kv_blocks
        assert n * need.host_pages <= made.resolved.num_pages
    if held.limited_by == "swap pool":
        assert (n + 1) * need.host_pages > made.resolved.num_pages


SIZES = st.integers(1, 5000)


@given(blocks=st.integers(0, 10**6), dense=SIZES, prefill=SIZES, sparse=SIZES)
def test_counts_of_requests_are_the_largest_that_fit(blocks, dense, prefill, sparse):
    prefill = min(dense, prefill)
    need = Need(dense, prefill, min(prefill, sparse), dense)
    most = dense_requests(need, blocks)
    assert most * dense <= max(0, blocks - 1) < (most + 1) * dense
    some = sparse_requests(need, blocks)
    assert some >= most or not most
    assert some == 0 or 1 + prefill + (some - 1) * need.sparse_blocks <= blocks
    assert 1 + prefill + some * need.sparse_blocks > blocks


@given(context=st.integers(9000, 131072), link=st.floats(1, 1000), device=st.floats(100, 10000))
def test_at_break_even_both_kinds_of_step_move_their_bytes_as_fast(context, link, device):
    machine = replace(MACHINE, link_bandwidth=link * 1e9, device_bandwidth=device * 1e9)
    even = plan(machine, context).break_even
    dense, sparse = (b / machine.device_bandwidth for b in (even.dense_bytes, even.sparse_bytes))

    def swap(rate, bandwidth):
        return (1 - rate) * even.miss_bytes / bandwidth

    assert even.hit_rate is not None and even.link_bandwidth is not None
    assert sparse + swap(0, even.link_bandwidth) == pytest.approx(dense)
    seconds = sparse + swap(even.hit_rate, machine.link_bandwidth)
    assert seconds == pytest.approx(dense) or (even.hit_rate == 0 and seconds < dense)


def test_a_context_within_the_budget_never_breaks_even():
    assert plan(context=400).break_even.hit_rate is None


def test_a_prompt_longer_than_the_gpu_is_planned_where_its_history_may_visit():
    small = replace(MACHINE, kv_cache_bytes=4 * GIB)
    made = plan(small)
    assert made.need.prefill_blocks < made.capacity.kv_blocks < made.need.dense_blocks
    assert made.capacity.dense_requests == 0 < made.capacity.sparse_requests
    for forbidding in ({"visits": False}, {"host_kv_dtype": "int8"}, {"policy": "snapkv"}):
        stays = plan(small, **forbidding)
        assert stays.need.prefill_blocks == stays.need.dense_blocks
        assert stays.capacity.sparse_requests == 0


def test_ranks_share_heads_and_the_hosts_memory():
    one, four = plan(), plan(replace(MACHINE, tensor_parallel=4))
    assert four.kv_token_bytes * 4 == one.kv_token_bytes
    assert four.host_bytes == 4 * four.resolved.host_pool_bytes
    sixteen = plan(replace(MACHINE, tensor_parallel=16))
    assert sixteen.kv_token_bytes * 8 == one.kv_token_bytes, "heads are copied"


@pytest.mark.parametrize(
    "machine, context, told",
    [
        (MACHINE, 131073, "set it to at most 131072"),
        (replace(MACHINE, tensor_parallel=3), 9000, "must divide the model's 32 heads, got 3"),
    ],
)
def test_what_cannot_be_is_refused_with_the_fix(machine, context, told):
    with pytest.raises(PlanError, match=told):
        plan(machine, context)


# The command -------------------------------------------------------------------------------


def configuration(folder, **changes):
    config = json.loads((PACKAGE / "assets" / "tiny-recall" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder / "config.json")


GIVEN = ["--gpu-memory-gib", "24", "--host-memory-gib", "16"]


def test_numbers_yaml_and_table_are_one_plan(capsys):
    pytest.importorskip("transformers", reason="transformers is not installed")
    assert cli.main(["plan", TINY, *GIVEN, "--budget", "1024", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert cli.main(["plan", TINY, *GIVEN, "--budget", "1024", "--yaml"]) == 0
    arguments = yaml.safe_load(capsys.readouterr().out)
    assert arguments == told["arguments"]
    assert cli.main(["plan", TINY, *GIVEN, "--budget", "1024"]) == 0
    table = capsys.readouterr().out
    capacity, ours = told["capacity"], arguments["additional-config"]["sentencekv"]
    for words in (f"│ {capacity['sparse_requests']}, limited by", "\nvllm serve ",
                  f'"host_pool_gib": {ours["host_pool_gib"]}'):  # fmt: skip
        assert words in table
    resolved = resolve(
        SentenceKVConfig.from_dict(ours),
        block_size=arguments["block-size"],
        num_kv_heads=2, head_dim=64, num_layers=4, dtype_size=2,
    )  # fmt: skip
    assert resolved.host_pool_bytes == told["host_pool_bytes"]
    assert resolved.index_bytes == told["index_bytes"]
    assert resolved.resident_blocks == told["request"]["sparse_blocks"]


def test_weights_without_files_are_counted(tmp_path, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed")
    weights = {}
    for model in (configuration(tmp_path), TINY):
        assert cli.main(["plan", model, *GIVEN, "--json"]) == 0
        weights[model] = json.loads(capsys.readouterr().out)["model"]["weight_bytes"]
    counted, files = weights.values()
    assert counted == pytest.approx(files, rel=0.01)


@pytest.mark.parametrize(
    "changes, options, told",
    [
        ({"sliding_window": 512, "layer_types": ["sliding_attention"] * 4, "model_type": "qwen3",
          "use_sliding_window": True}, [], "full attention in every layer"),
        ({}, ["--context", "40000"], "set it to at most 32768"),
        ({}, ["--tensor-parallel", "3"], "must divide the model's 4 heads"),
        ({}, ["--budget", "100"], "the smallest budget is 192"),
        ({}, ["--policy", "quets"], "did you mean 'quest'"),
        ({}, ["--dtype", "int3"], "--dtype must be one of auto, bfloat16"),
        ({}, ["--json", "--yaml"], "exclude each other"),
        ({}, ["--block-size", "512"], "set --block-size to at most 256"),
    ],
)  # fmt: skip
def test_a_plan_that_breaks_a_rule_is_refused(tmp_path, capsys, changes, options, told):
    pytest.importorskip("transformers", reason="transformers is not installed")
    assert cli.main(["plan", configuration(tmp_path, **changes), *GIVEN, *options]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("sentencekv plan: ") and told in err


def test_a_machine_that_holds_no_request_is_a_failure_with_the_numbers(capsys):
    pytest.importorskip("transformers", reason="transformers is not installed")
    assert cli.main(["plan", TINY, *GIVEN, "--kv-cache-gib", "0.01", "--yaml"]) == 1
    out, err = capsys.readouterr()
    assert not out and "there is room for 163 and" in err and "raise --gpu-memory-gib" in err


def test_a_model_that_is_not_there_is_named(tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    assert cli.main(["plan", str(tmp_path), *GIVEN]) == 2
    assert "MODEL must be a folder with config.json" in capsys.readouterr().err
