# SPDX-License-Identifier: Apache-2.0
"""What is not supported is refused at start-up, by name and with a way out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")

from engine import MODEL  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.v1.engine import EngineCoreRequest  # noqa: E402

from sentencekv_vllm.config import SentenceKVConfig  # noqa: E402
from sentencekv_vllm.plugin import register  # noqa: E402
from sentencekv_vllm.resolved import resolve  # noqa: E402
from sentencekv_vllm.vllm_glue import request_limits, setup  # noqa: E402
from sentencekv_vllm.worker.host_memory import GIB, available_bytes  # noqa: E402


def configuration(
    model=(),
    parallel=(),
    cache=(),
    attention=(),
    scheduler=(),
    transfer=None,
    speculative=None,
    settings=(),
):
    """A vLLM configuration that is supported, but for the changes."""

    def namespace(changes, **defaults):
        return SimpleNamespace(**(defaults | dict(changes)))

    model = dict(model)
    text = {"model_type": "llama", "num_hidden_layers": 3, "sliding_window": None}
    text |= {name: model.pop(name) for name in (*text, "layer_types") if name in model}
    return SimpleNamespace(
        additional_config={"sentencekv": dict(settings)},
        model_config=namespace(
            model,
            runner_type="generate",
            is_encoder_decoder=False,
            use_mla=False,
            is_hybrid=False,
            is_attention_free=False,
            enable_sleep_mode=False,
            dtype=torch.bfloat16,
            max_model_len=8192,
            hf_text_config=SimpleNamespace(**text),
            get_sliding_window=lambda: text["sliding_window"],
        ),
        scheduler_config=namespace(scheduler, disable_hybrid_kv_cache_manager=None),
        parallel_config=namespace(
            parallel,
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            use_ubatching=False,
            enable_fault_tolerance=False,
        ),
        cache_config=namespace(
            cache,
            cache_dtype="auto",
            kv_offloading_size=None,
            block_size=32,
            prefix_match_unit=None,
        ),
        attention_config=namespace(attention, hisparse_config=None),
        kv_transfer_config=transfer,
        speculative_config=speculative,
    )


LAYER_TYPES = ["sliding_attention", "sliding_attention", "full_attention"]
GEMMA = {"model_type": "gemma3_text", "sliding_window": 4096, "layer_types": LAYER_TYPES}

REFUSED = {
    "MLA": ({"model": {"use_mla": True}}, "multi-head latent", "another attention backend"),
    "windows alone": (
        {"model": {"sliding_window": 4096}},
        "a sliding window in every layer .here 4096 tokens",
        "set --max-model-len to the window",
    ),
    "other windows": (
        {"model": GEMMA | {"model_type": "gemma2"}},
        "other model types .here gemma2.*so far .*gemma3_text",
        "another attention backend",
    ),
    "one group for windows": (
        {"model": GEMMA, "scheduler": {"disable_hybrid_kv_cache_manager": True}},
        "--disable-hybrid-kv-cache-manager",
        "remove it",
    ),
    "hybrid": ({"model": {"is_hybrid": True}}, "hybrid, Mamba", "another attention backend"),
    "Mamba": (
        {"model": {"is_attention_free": True}},
        "attention-free",
        "another attention backend",
    ),
    "encoder-decoder": (
        {"model": {"is_encoder_decoder": True}},
        "encoder-decoder",
        "another attention backend",
    ),
    "runner": (
        {"model": {"runner_type": "pooling"}},
        "runners other than.*here 'pooling'",
        "another attention backend",
    ),
    "sleep mode": (
        {"model": {"enable_sleep_mode": True}},
        "sleep mode",
        "remove --enable-sleep-mode",
    ),
    "speculative": ({"speculative": object()}, "speculative", "remove --speculative-config"),
    "pipeline": (
        {"parallel": {"pipeline_parallel_size": 2}},
        "pipeline parallelism .here 2",
        "--pipeline-parallel-size 1",
    ),
    "DCP": (
        {"parallel": {"decode_context_parallel_size": 2}},
        "decode context parallelism",
        "--decode-context-parallel-size 1",
    ),
    "PCP": (
        {"parallel": {"prefill_context_parallel_size": 4}},
        "prefill context parallelism .here 4",
        "--prefill-context-parallel-size 1",
    ),
    "fp8 KV": ({"cache": {"cache_dtype": "fp8"}}, "quantised KV cache .here fp8", "auto"),
    "KV dtype": (
        {"cache": {"cache_dtype": "float16"}},
        "float16 for a model of torch.bfloat16",
        "--kv-cache-dtype auto",
    ),
    "microbatches": ({"parallel": {"use_ubatching": True}}, "microbatches", "remove them"),
    "chunked attention": (
        {"model": {"attention_chunk_size": 8192}},
        "chunked local attention.*here 8192 tokens",
        "another attention backend",
    ),
    "HiSparse": (
        {"attention": {"hisparse_config": object()}},
        "HiSparse",
        "remove hisparse_config",
    ),
    "fault tolerance": (
        {"parallel": {"enable_fault_tolerance": True}},
        "--enable-fault-tolerance",
        "remove it",
    ),
    "Rust front end": (
        {"environment": {"VLLM_USE_RUST_FRONTEND": "1"}},
        "Rust front end",
        "unset VLLM_USE_RUST_FRONTEND",
    ),
    "platform": (
        {"platform": SimpleNamespace(is_cpu=bool, is_cuda=bool, device_name="tpu")},
        "platforms other than CPU and CUDA .here tpu",
        "another attention backend",
    ),
    "partial prefix hits": (
        {"cache": {"prefix_match_unit": 16}},
        "prefix-match-unit. .here 16",
        "remove --prefix-match-unit",
    ),
    "KV offloading": (
        {"cache": {"kv_offloading_size": 4.0}},
        "kv-offloading-size",
        "host_pool_gib",
    ),
    "connector": (
        {"transfer": SimpleNamespace(kv_connector="NixlConnector")},
        "KV connector of your own .here NixlConnector",
        "remove --kv-transfer-config",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_each_refusal_names_what_and_the_way_out(case, monkeypatch):
    changes, what, fix = REFUSED[case]
    changes = dict(changes)
    for name, value in changes.pop("environment", {}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(setup, "current_platform", changes.pop("platform", setup.current_platform))
    with pytest.raises(ValueError) as refusal:
        setup.refuse(configuration(**changes))
    assert re.search(what, str(refusal.value)), str(refusal.value)
    assert re.search(fix, str(refusal.value)), str(refusal.value)


def test_what_is_supported_is_not_refused():
    setup.refuse(configuration())
    setup.refuse(configuration(cache={"cache_dtype": "bfloat16"}))
    setup.refuse(configuration(cache={"prefix_match_unit": 32}))
    setup.refuse(configuration(transfer=SimpleNamespace(kv_connector="SentenceKVConnector")))
    setup.refuse(configuration(model=GEMMA))
    setup.refuse(configuration(scheduler={"disable_hybrid_kv_cache_manager": True}))


@pytest.mark.parametrize("window", [8192, 2**18])
def test_a_window_that_no_request_outgrows_is_none(window):
    setup.refuse(configuration(model={"sliding_window": window}))
    setup.refuse(configuration(model=GEMMA | {"model_type": "other", "sliding_window": window}))
    with pytest.raises(ValueError, match="in every layer .here 8191 tokens"):
        setup.refuse(configuration(model={"sliding_window": 8191}))


@pytest.mark.parametrize("version", ["0.31.4", "0.34.0", "1.0.0rc1", "0.34.0.dev5+g1234567"])
def test_other_versions_of_vllm_need_the_users_word(version, monkeypatch):
    monkeypatch.setattr(setup.vllm, "__version__", version)
    with pytest.raises(ValueError, match="tested with vLLM 0.32 and 0.33, this is") as refusal:
        setup.refuse(configuration())
    assert version in str(refusal.value) and "allow_untested_vllm" in str(refusal.value)
    setup.refuse(configuration(settings={"allow_untested_vllm": True}))


def test_every_patch_of_a_tested_version_is_accepted(monkeypatch):
    for version in ("0.32.0", "0.32.5", "0.32.1+cpu", "0.33.0", "0.33.1rc1"):
        monkeypatch.setattr(setup.vllm, "__version__", version)
        setup.refuse(configuration())


SELECTION = {
    "head size": ({"head_size": 40}, "head_size"),
    "a head size that the stock op takes": ({"head_size": 512}, "head_size"),
    "MLA": ({"use_mla": True}, "MLA"),
    "learned sinks": ({"has_sink": True}, "attention sinks"),
    "a trained indexer": ({"use_sparse": True}, "sparse"),
    "encoder-only": ({"attn_type": "encoder_only"}, "attention type encoder_only"),
    "cross attention": ({"attn_type": "encoder_decoder"}, "attention type encoder_decoder"),
    "sliding window": ({"has_sliding_window": True}, "sliding window"),
    "multimodal prefix": ({"use_mm_prefix": True}, "multimodal"),
    "non-causal": ({"use_non_causal": True}, "non-causal"),
    "fp8 KV": ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
    "DCP": ({"use_dcp": True}, "DCP"),
    "PCP": ({"use_pcp": True}, "PCP"),
    "block size": ({"block_size": 16}, "block_size"),
}


def choose(**changes):
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    register()
    values = {
        "head_size": 64,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 32,
        "use_kv_connector": True,
    }
    wanted = AttentionSelectorConfig(**(values | changes))
    return current_platform.get_attn_backend_cls(AttentionBackendEnum.SENTENCEKV, wanted, 4)


@pytest.mark.parametrize("case", SELECTION)
def test_layers_that_the_backend_cannot_serve_are_refused_not_replaced(case):
    changes, reason = SELECTION[case]
    with pytest.raises(ValueError, match=f"{reason}.*Use another attention backend"):
        choose(**changes)


def test_layers_that_it_can_serve_are_its_own():
    assert choose().endswith("SentenceKVBackend")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"kv_sharing_target_layer_name": "layers.3"}, "layers.3"),
    ],
)
def test_a_layer_with_alibi_or_a_shared_cache_is_refused(arguments, reason):
    from sentencekv_vllm.vllm_glue.cpu import Impl

    values = {
        "num_heads": 4,
        "head_size": 64,
        "scale": 0.125,
        "num_kv_heads": 2,
        "alibi_slopes": None,
        "sliding_window": None,
        "kv_cache_dtype": "auto",
    }
    with pytest.raises(ValueError, match=f"{reason}.*another attention backend"):
        Impl(**(values | arguments))


def test_a_layer_with_a_window_of_its_own_is_refused():
    from sentencekv_vllm.vllm_glue.impl import refuse_window

    refuse_window(None, 8192)
    refuse_window(8192, 8192)
    with pytest.raises(ValueError, match="windowed layer.*here 8191 tokens.*another attention"):
        refuse_window(8191, 8192)


@pytest.mark.parametrize("ours", [0, 2])
def test_full_layers_in_other_than_one_group_are_refused(ours):
    from sentencekv_vllm.vllm_glue.groups import our_group, our_manager
    from sentencekv_vllm.vllm_glue.manager import SentenceKVManager
    from sentencekv_vllm.vllm_glue.spec import SentenceKVSpec

    shape = {"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    others = [SimpleNamespace(kv_cache_spec=object())]
    groups = [SimpleNamespace(kv_cache_spec=SentenceKVSpec(**shape))] * ours + others
    managers = [object.__new__(SentenceKVManager)] * ours + [object()]
    coordinator = SimpleNamespace(single_type_managers=managers)
    for find, among in (
        (our_group, SimpleNamespace(kv_cache_groups=groups)),
        (our_manager, SimpleNamespace(coordinator=coordinator)),
    ):
        with pytest.raises(ValueError, match=f"not one KV cache group .here {ours} of"):
            find(among)


@pytest.mark.parametrize("model", [{}, GEMMA], ids=["dense", "windows"])
def test_prompts_of_models_with_windows_must_fit(model):
    from sentencekv_vllm.config import ConfigError
    from sentencekv_vllm.vllm_glue.visit_room import Capacity, check_pool, visit_room

    config = configuration(model=model, scheduler={"scheduler_reserve_full_isl": True})
    config.max_in_flight_tokens = 1024
    sizes = {"num_kv_heads": 2, "head_dim": 64, "num_layers": 4, "dtype_size": 2}
    resolved = resolve(SentenceKVConfig(), block_size=32, **sizes)
    assert (visit_room(config, resolved) is None) == bool(model)
    assert bool(Capacity.of(config, resolved, 200).visiting) != bool(model)
    if model:  # 8192 tokens are 256 blocks; the windows take some of the pool
        check_pool(config, resolved, 257 + 40, others=40)
        with pytest.raises(ConfigError, match="needs 256 .*, the pool has 255 beside 40 for"):
            check_pool(config, resolved, 256 + 40, others=40)


def test_windowed_layers_keep_the_stock_backend_and_the_users_choice():
    register()
    config = configuration(model=GEMMA, attention={"backend_per_kind": {}})
    setup.leave_windows_to_stock(config)
    (chosen,) = config.attention_config.backend_per_kind.items()
    assert chosen[0] == "sliding_window" and chosen[1].name != "SENTENCEKV"
    for model, kinds in ((GEMMA, {"sliding_window": "mine"}), ({}, {})):
        config = configuration(model=model, attention={"backend_per_kind": dict(kinds)})
        setup.leave_windows_to_stock(config)
        assert config.attention_config.backend_per_kind == kinds


def real(tmp_path=None, changes=None, **options):
    """vLLM's own configuration, of the embedded model or one like it."""
    model = MODEL
    if changes is not None:
        config = json.loads(Path(MODEL, "config.json").read_text()) | changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        model = str(tmp_path)
        options["skip_tokenizer_init"] = True
    options = {"attention_backend": "sentencekv", "max_model_len": 4096} | options
    return EngineArgs(model=model, **options).create_engine_config()


def free_gib():
    return available_bytes() / GIB


REAL = {
    "a connector": (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "KV connector of your own",
    ),
    "pipeline": ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
    "speculative": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        "speculative decoding",
    ),
    "fp8 KV": ({"kv_cache_dtype": "fp8"}, "quantised KV cache"),
    "KV offloading": ({"kv_offloading_size": 1.0}, "kv-offloading-size"),
    "a swap pool beyond the memory": (
        {"additional_config": {"sentencekv": {"host_pool_gib": 4000}}},
        "host_pool_gib 4000 of 1 worker.* takes 4000.00 GiB, .* GiB of host memory are free",
    ),
    "swap pools of ranks that only fit alone": (
        {
            "additional_config": {"sentencekv": {"host_pool_gib": 0.7 * free_gib()}},
            "tensor_parallel_size": 2,
        },
        "of 2 worker.* set it to at most",
    ),
    "some layers only": (
        {
            "attention_backend": None,
            "attention_config": {"backend_per_kind": {"full_attention": "sentencekv"}},
        },
        "backend_per_kind.*here full_attention",
    ),
}


@pytest.mark.parametrize("case", REAL)
def test_vllms_own_options_are_refused(case):
    options, reason = REAL[case]
    with pytest.raises(ValueError, match=reason):
        real(**options)


def test_a_sliding_window_model_is_refused(tmp_path):
    mistral = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 1024,
    }
    with pytest.raises(ValueError, match="a sliding window in every layer"):
        real(tmp_path, mistral)


def arriving(prompt, monkeypatch, visiting=0, images=None, **params):
    """A request in front of a pool of ten blocks; what is left of its parameters."""
    from vllm import SamplingParams

    config = SimpleNamespace(
        cache_config=SimpleNamespace(num_gpu_blocks=11, block_size=32),
        parallel_config=SimpleNamespace(data_parallel_size=1),
    )
    sizes = {"num_kv_heads": 2, "head_dim": 64, "num_layers": 4, "dtype_size": 2}
    resolved = resolve(SentenceKVConfig(), block_size=32, **sizes)
    monkeypatch.setattr(request_limits, "resolved_config", lambda _: resolved)
    capacity = request_limits.Capacity(320, visiting)
    monkeypatch.setattr(request_limits.Capacity, "of", lambda *_: capacity)
    params = SamplingParams(**params)
    request = EngineCoreRequest("", [1] * prompt, images, params, None, 0.0, None, None, None)
    request_limits.limit_request(config, request)
    return params


def test_prompts_that_never_fit_are_refused_with_the_numbers(monkeypatch):
    from vllm.exceptions import VLLMValidationError

    arriving(320, monkeypatch, max_tokens=1)
    with pytest.raises(VLLMValidationError, match="needs 11 KV blocks of 32, the pool has 10"):
        arriving(321, monkeypatch, max_tokens=1)
    arriving(321, monkeypatch, visiting=1000, max_tokens=1)
    with pytest.raises(VLLMValidationError, match="send at most 1000 tokens"):
        arriving(1001, monkeypatch, visiting=1000, max_tokens=1)
    for off in ({"sentencekv": "off"}, {"sentencekv_policy": "full"}):
        with pytest.raises(VLLMValidationError, match="cannot leave the GPU.*at most 320 tokens"):
            arriving(321, monkeypatch, visiting=1000, extra_args=off)
    with pytest.raises(VLLMValidationError, match="cannot leave the GPU.*at most 320 tokens"):
        arriving(321, monkeypatch, visiting=1000, images=[object()])


def test_an_answer_ends_where_the_memory_does(monkeypatch):
    from vllm.exceptions import VLLMValidationError

    assert arriving(300, monkeypatch, max_tokens=21).max_tokens == 21
    assert arriving(300, monkeypatch, max_tokens=22).max_tokens == 21, "320 computed, one sampled"
    assert arriving(300, monkeypatch, visiting=400, max_tokens=500).max_tokens == 101
    with pytest.raises(VLLMValidationError, match="at most 290 tokens"):
        arriving(300, monkeypatch, max_tokens=50, min_tokens=31)
