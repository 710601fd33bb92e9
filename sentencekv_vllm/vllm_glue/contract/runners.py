# SPDX-License-Identifier: Apache-2.0
"""Both model runners, and the CUDA graphs of a whole step."""

from __future__ import annotations

from .name import How, Name, of

ROWS: tuple[Name, ...] = (
    *of(
        "v1/worker/gpu/model_runner.py",
        "GPUModelRunner",
        "vllm_glue/full_graphs.py",
        How.WRAPPED,
        {
            "gather_batch_req_state": "self, scheduler_output, dummy_run",
        },
    ),
    *of(
        "v1/worker/gpu/model_runner.py",
        "GPUModelRunner",
        "vllm_glue/full_graphs.py",
        How.READ,
        ("cudagraph_manager",),
    ),
    *of(
        "v1/worker/gpu/cudagraph_utils.py",
        "ModelCudaGraphManager",
        "vllm_glue/full_graphs.py",
        How.WRAPPED,
        {
            "capture": (
                "self, model, model_state, input_buffers, intermediate_tensors, "
                "block_tables, attn_groups, kv_cache_config, pcp_manager=None, "
                "has_lora=False, use_aux_hidden_state_outputs=False, "
                "lora_capture_hook=None, progress_bar_desc='Capturing CUDA graphs'"
            ),
            "run_fullgraph": "self, desc",
        },
    ),
    *of(
        "v1/worker/gpu/cudagraph_utils.py",
        "ModelCudaGraphManager",
        "vllm_glue/step_graphs.py",
        How.READ,
        ("hidden_states",),
    ),
    *of(
        "v1/worker/gpu/cudagraph_utils.py",
        "CudaGraphManager",
        "vllm_glue/step_graphs.py",
        How.READ,
        (
            "dp_size",
            "tp_size",
            "vllm_config",
        ),
    ),
    *of(
        "v1/worker/gpu/input_batch.py",
        "InputBuffers",
        "vllm_glue/step_graphs.py",
        How.READ,
        (
            "input_ids",
            "positions",
            "is_padding",
        ),
    ),
    *of(
        "v1/worker/gpu/model_states/interface.py",
        "ModelState",
        "vllm_glue/step_graphs.py",
        How.CALLED,
        {
            "prepare_dummy_inputs": "self, num_reqs, num_tokens",
        },
    ),
    *of(
        "v1/cudagraph_dispatcher.py",
        "CudagraphDispatcher",
        "vllm_glue/full_graphs.py",
        How.WRAPPED,
        {
            "dispatch": (
                "self, num_tokens, uniform_decode=False, has_lora=False, "
                "num_active_loras=0, valid_modes=None, invalid_modes=None"
            ),
        },
    ),
    *of(
        "forward_context.py",
        "",
        "vllm_glue/step_graphs.py",
        How.CALLED,
        {
            "set_forward_context": (
                "attn_metadata, vllm_config, num_tokens=None, "
                "num_tokens_across_dp=None, cudagraph_runtime_mode=CUDAGraphMode.NONE, "
                "batch_descriptor=None, ubatch_slices=None, slot_mapping=None, "
                "skip_compiled=False, is_padding=None"
            ),
        },
    ),
    Name(
        "v1/worker/gpu/model_runner.py",
        "GPUModelRunner.execute_model",
        "vllm_glue/full_graphs.py",
        How.ORDER,
        parts=(
            "self.gather_batch_req_state(",
            "dispatch_cg_and_sync_dp(",
            "model_state.prepare_attn(",
            "kv_connector.pre_forward(",
            "run_fullgraph(",
            "self.kv_connector.finish_forward(",
        ),
    ),
    Name(
        "v1/worker/gpu_model_runner.py",
        "GPUModelRunner.execute_model",
        "vllm_glue/full_graphs.py",
        How.ORDER,
        parts=(
            "handle_preemptions(",
            "self._determine_batch_execution_and_padding(",
            "self._build_attention_metadata(",
            "self.maybe_get_kv_connector_output(",
        ),
    ),
    Name(
        "v1/worker/gpu/kv_connector.py",
        "ActiveKVConnector.pre_forward",
        "vllm_glue/connector.py",
        How.ORDER,
        parts=("handle_preemptions(", "has_sync_kv_loads", "_start_load_kv()"),
    ),
    Name(
        "v1/worker/gpu/kv_connector.py",
        "ActiveKVConnector._build_load_kwargs",
        "vllm_glue/connector.py",
        How.READ,
        parts=("'attn_metadata'",),
    ),
)
