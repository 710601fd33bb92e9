# SPDX-License-Identifier: Apache-2.0
"""Every touch of a vLLM name that is not meant for plugins, the same in vLLM 0.32 and 0.33.

Wraps delegate to the original and do nothing unless a configuration has selected our
backend. Where each name lives: v1/attention/backends/registry.py (AttentionBackendEnum),
platforms/{cpu,cuda}.py (get_attn_backend_cls, check_and_update_config),
distributed/kv_transfer/kv_connector/factory.py (KVConnectorFactory._registry),
v1/engine/input_processor.py (InputProcessor._validate_params, .process_inputs).
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.engine.input_processor import InputProcessor

from . import request_limits, setup

NAME = "SENTENCEKV"
CONNECTOR = "SentenceKVConnector"


def install() -> None:
    """Register backend and connector, and put the wraps in place, once a process."""
    if NAME in AttentionBackendEnum.__members__:
        return
    register_backend(NAME, "sentencekv_vllm.vllm_glue.backend.SentenceKVBackend")
    # A spawned process unpickles the configuration before it loads plugins, and an Enum
    # pickles by value: the member would not be known there.
    copyreg.pickle(AttentionBackendEnum, _reduce_member)
    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(
            CONNECTOR, "sentencekv_vllm.vllm_glue.connector", CONNECTOR
        )
    platform = type(current_platform)
    _wrap(platform, "check_and_update_config", _check_and_update_config)
    if current_platform.is_cpu():  # CUDA honours a registered backend by itself
        _wrap(platform, "get_attn_backend_cls", _get_attn_backend_cls)
    _wrap(InputProcessor, "_validate_params", _validate_params)
    _wrap(InputProcessor, "process_inputs", _process_inputs)


def _reduce_member(member: AttentionBackendEnum) -> tuple[Callable[[str], Any], tuple[str]]:
    return restore_member, (member.name,)


def restore_member(name: str) -> Any:
    """Unpickle a member of the backend table; importing this module is what registers ours."""
    install()
    return AttentionBackendEnum[name]


def selected(vllm_config: Any) -> bool:
    """This configuration has chosen our backend."""
    backend = vllm_config.attention_config.backend
    return backend is not None and backend.name == NAME


def _wrap(owner: type, name: str, replacement: Callable[..., Any]) -> None:
    """Replace `owner.name` by `replacement(original, ...)`; class methods stay class methods."""
    bound = getattr(owner, name)
    is_classmethod = hasattr(bound, "__func__")
    original = bound.__func__ if is_classmethod else bound

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(functools.partial(original, self), self, *args, **kwargs)

    setattr(owner, name, classmethod(wrapped) if is_classmethod else wrapped)


def _check_and_update_config(original: Callable[..., Any], cls: Any, vllm_config: Any) -> None:
    if not selected(vllm_config):
        setup.refuse_partial_selection(vllm_config, NAME)
        original(vllm_config)
        return
    setup.refuse(vllm_config)
    setup.inject_connector(vllm_config, CONNECTOR)
    setup.leave_windows_to_stock(vllm_config)
    original(vllm_config)
    setup.settle(vllm_config)


def _get_attn_backend_cls(
    original: Callable[..., Any],
    cls: Any,
    selected_backend: Any,
    attn_selector_config: Any,
    num_heads: int | None = None,
) -> str:
    if selected_backend is None or selected_backend.name != NAME:
        return str(original(selected_backend, attn_selector_config, num_heads))
    backend = selected_backend.get_class()
    reasons = backend.validate_configuration(
        device_capability=None, **attn_selector_config._asdict()
    )
    if reasons:
        raise ValueError(
            f"sentencekv cannot serve this model: {'; '.join(reasons)}. Use another attention "
            "backend, for example by leaving --attention-backend away."
        )
    return str(selected_backend.get_path())


def _validate_params(
    original: Callable[..., Any], processor: InputProcessor, params: Any, *args: Any, **kwargs: Any
) -> Any:
    if selected(processor.vllm_config) and isinstance(params, SamplingParams):
        setup.check_request_options(processor.vllm_config, params.extra_args)
    return original(params, *args, **kwargs)


def _process_inputs(
    original: Callable[..., Any], processor: InputProcessor, *args: Any, **kwargs: Any
) -> Any:
    request = original(*args, **kwargs)
    if selected(processor.vllm_config):
        request_limits.limit_request(processor.vllm_config, request)
    return request
