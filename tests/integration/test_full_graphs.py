# SPDX-License-Identifier: Apache-2.0
"""vLLM's own dispatchers, both runners', with and without sparse rows in the step."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import CUDAGraphMode  # noqa: E402
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher  # noqa: E402
from vllm.v1.worker import gpu_model_runner as v1  # noqa: E402
from vllm.v1.worker.gpu import model_runner as v2  # noqa: E402
from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager  # noqa: E402
from vllm.v1.worker.gpu.dp_utils import dispatch_cg_and_sync_dp  # noqa: E402

from sentencekv_vllm.vllm_glue import full_graphs  # noqa: E402

SIZES = [1, 2, 4, 8]
MODES = [CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.FULL_DECODE_ONLY]


class Message:
    def __init__(self, sparse):
        self.sparse = sparse


class FakeRuntime:
    """Knows of sparse rows from the message on, as `Runtime` does."""

    acts_in_layers = False

    def apply(self, message):
        self.acts_in_layers = message.sparse


@pytest.fixture
def runtime(monkeypatch):
    runtime = FakeRuntime()
    monkeypatch.setattr(full_graphs, "current_runtime", lambda: runtime)
    return runtime


@pytest.fixture
def installed(monkeypatch):
    """`install`, undone afterwards."""
    for owner, name in ((v2.GPUModelRunner, "gather_batch_req_state"),
                        (ModelCudaGraphManager, "capture"),
                        (ModelCudaGraphManager, "run_fullgraph"),
                        (CudagraphDispatcher, "dispatch")):  # fmt: skip
        monkeypatch.setattr(owner, name, getattr(owner, name))
    return lambda is_v2, mode=MODES[0]: full_graphs.install(config(mode, is_v2))


def config(mode, is_v2=True):
    return SimpleNamespace(
        compilation_config=SimpleNamespace(
            cudagraph_mode=mode,
            cudagraph_capture_sizes=SIZES,
            max_cudagraph_capture_size=SIZES[-1],
            compile_sizes=None,
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=SIZES[-1]),
        speculative_config=None,
        lora_config=None,
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        use_v2_model_runner=is_v2,
    )


def v2_manager(mode):
    """The V2 runner's manager with its real candidates, as after the capture."""
    manager = object.__new__(ModelCudaGraphManager)
    manager.vllm_config = config(mode)
    manager.compilation_config = manager.vllm_config.compilation_config
    manager.cudagraph_mode, manager.max_num_reqs = mode, SIZES[-1]
    manager.decode_query_len, manager.varlen_decode, manager.ubatch_runner = 1, False, None
    manager.lora_capture_cases, manager._lora_dispatch_map = [0], {}
    manager._candidates, manager._capture_descs, manager._graphs_captured = {}, {}, True
    manager._init_candidates()
    return manager


def v2_mode(manager, num_reqs, sparse, dummy_run=False):
    """The graph that the V2 runner takes for a decode step of `num_reqs` requests."""
    output = SimpleNamespace(
        num_scheduled_tokens={str(i): 1 for i in range(num_reqs)},
        total_num_scheduled_tokens=num_reqs,
        kv_connector_metadata=None if dummy_run else SimpleNamespace(message=Message(sparse)),
    )
    runner = object.__new__(v2.GPUModelRunner)
    runner.cudagraph_manager = manager
    if dummy_run:
        _, uniform = runner.gather_batch_req_state(output, True)
    else:
        _, uniform = full_graphs.gather_batch_req_state(lambda *_: (None, 1), runner, output, False)
    chosen, _ = dispatch_cg_and_sync_dp(
        manager, num_reqs, num_reqs, uniform, dp_size=1, dp_rank=0, max_query_len=1
    )
    return chosen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_reqs", [1, 3, 8])
def test_v2_takes_full_graphs_for_steps_without_sparse_rows_alone(runtime, mode, num_reqs):
    manager = v2_manager(mode)
    dense, sparse = (v2_mode(manager, num_reqs, rows) for rows in (False, True))
    assert dense.cg_mode is CUDAGraphMode.FULL
    assert sparse.cg_mode is mode.mixed_mode()
    assert v2_mode(manager, num_reqs, False).cg_mode is CUDAGraphMode.FULL, "and the step after"


def test_v2_dummy_runs_are_left_alone(runtime, installed):
    installed(is_v2=True)
    runtime.acts_in_layers = True
    chosen = v2_mode(v2_manager(MODES[0]), 4, False, dummy_run=True)
    assert chosen.cg_mode is CUDAGraphMode.FULL


def v1_dispatcher(mode):
    dispatcher = object.__new__(CudagraphDispatcher)
    dispatcher.vllm_config = config(mode)
    dispatcher.compilation_config = dispatcher.vllm_config.compilation_config
    dispatcher.compilation_config.cudagraph_specialize_lora = False
    dispatcher.uniform_decode_query_len, dispatcher.specialize_lora_count = 1, False
    dispatcher.cudagraph_keys = {CUDAGraphMode.PIECEWISE: set(), CUDAGraphMode.FULL: set()}
    dispatcher.initialize_cudagraph_keys(mode)
    return dispatcher


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_tokens", [1, 3, 8])
def test_v1_takes_full_graphs_for_steps_without_sparse_rows_alone(
    runtime, installed, mode, num_tokens
):
    installed(is_v2=False)
    dispatcher = v1_dispatcher(mode)
    arguments = {"num_tokens": num_tokens, "uniform_decode": True, "valid_modes": None}
    assert dispatcher.dispatch(**arguments)[0] is CUDAGraphMode.FULL
    runtime.acts_in_layers = True
    assert dispatcher.dispatch(**arguments)[0] is mode.mixed_mode()
    # The data-parallel ranks agreed on the mode before.
    agreed = arguments | {"valid_modes": frozenset({mode.mixed_mode()})}
    assert dispatcher.dispatch(**agreed)[0] is mode.mixed_mode()
    runtime.acts_in_layers = False
    assert dispatcher.dispatch(**arguments)[0] is CUDAGraphMode.FULL


@pytest.mark.parametrize("is_v2", [True, False])
def test_installing_twice_wraps_once(installed, is_v2):
    owner, name = (
        (v2.GPUModelRunner, "gather_batch_req_state")
        if is_v2
        else (CudagraphDispatcher, "dispatch")
    )
    before = getattr(owner, name)
    installed(is_v2)
    once = getattr(owner, name)
    installed(is_v2)
    assert getattr(owner, name) is once is not before


def test_another_signature_is_refused_at_start_up(monkeypatch, installed):
    for owner, name, is_v2 in ((v2.GPUModelRunner, "gather_batch_req_state", True),
                               (CudagraphDispatcher, "dispatch", False)):  # fmt: skip
        monkeypatch.setattr(owner, name, lambda self, surprise: None)
        with pytest.raises(ValueError, match=f"{name}.*found .*surprise.*install the vLLM version"):
            installed(is_v2)
        monkeypatch.delattr(owner, name)
        with pytest.raises(ValueError, match="found None"):
            installed(is_v2)
        monkeypatch.setattr(owner, name, None, raising=False)


def test_full_graphs_of_mixed_batches_are_refused(installed):
    with pytest.raises(ValueError, match="does not support cudagraph_mode FULL,.*set FULL_AND"):
        installed(True, CUDAGraphMode.FULL)


def in_order(function, *names):
    source = inspect.getsource(function)
    places = [source.index(name) for name in names]
    return places == sorted(places)


def test_the_runners_know_of_sparse_rows_before_they_choose_and_build():
    assert in_order(
        v2.GPUModelRunner.execute_model,
        *("self.gather_batch_req_state(", "dispatch_cg_and_sync_dp(", "model_state.prepare_attn("),
        *("kv_connector.pre_forward(", "run_fullgraph(", "self.kv_connector.finish_forward("),
    )
    assert in_order(
        v1.GPUModelRunner.execute_model,
        *("handle_preemptions(", "self._determine_batch_execution_and_padding("),
        *("self._build_attention_metadata(", "self.maybe_get_kv_connector_output("),
    )
