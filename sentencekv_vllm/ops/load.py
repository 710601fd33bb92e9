# SPDX-License-Identifier: Apache-2.0
"""The implementation of `LayerOps` for a device."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ..types import Geometry
from .layer_ops import LayerOps, ReferenceOps
from .native_build import BuildError

logger = logging.getLogger(__name__)

TEST_OPS = "SENTENCEKV_TEST_OPS"
"""Test flag, an environment variable: on a CPU, take the cpu, reference or triton ops."""


@dataclass(frozen=True)
class Sizes:
    """The largest batch of a worker; GPU ops own buffers for it."""

    geometry: Geometry
    device: torch.device
    max_requests: int  # sparse rows of a step
    max_pages: int  # blocks of the longest request
    max_sentences: int  # of one request
    max_selected: int  # blocks that one KV head selects, the R of `private_blocks`


def make_layer_ops(sizes: Sizes) -> LayerOps:
    """The ops of a worker.

    Raises:
        ValueError: there are no ops for the device.
    """
    chosen = os.environ.get(TEST_OPS) or sizes.device.type
    if chosen == "cuda":
        from .cuda_layer_ops import gpu_layer_ops

        quantized_pages = sizes.geometry.host_format is not None
        return gpu_layer_ops(_workspace(sizes), quantized_pages)
    if chosen == "reference":
        return ReferenceOps()
    if chosen == "triton":
        return _triton_on_cpu(sizes)
    return load_layer_ops(chosen)


@cache
def load_layer_ops(device_type: str) -> LayerOps:
    """The fastest ops of a device that need no sizes, one instance per process.

    Args:
        device_type: as in `torch.device.type`.

    Raises:
        ValueError: there are no ops for the device.
    """
    if device_type != "cpu":
        raise ValueError(f"no layer ops for device {device_type!r}: use cpu")
    from .cpu import CpuOps

    try:
        return CpuOps()
    except BuildError as error:
        logger.warning(
            "decode runs on the PyTorch reference ops, which are slow: the C++ ops were not "
            "built. Install g++ 12 or later and restart. %s",
            error,
        )
        return ReferenceOps()


def _workspace(sizes: Sizes) -> Any:
    from ..triton_kernels.workspace import Workspace

    return Workspace.allocate(
        sizes.geometry,
        sizes.max_requests,
        sizes.max_pages,
        sizes.max_sentences,
        sizes.max_selected,
        sizes.device,
    )


def _triton_on_cpu(sizes: Sizes) -> LayerOps:
    """Triton's decode for its interpreter, over the definitions of the index: the Triton index
    kernels read the layout of CUDA blocks, and CPU blocks are packed otherwise."""
    from ..triton_kernels.layer_ops import TritonOps

    ops: LayerOps = TritonOps(_workspace(sizes))
    definitions = ReferenceOps()
    ops.index_pages = definitions.index_pages  # type: ignore[method-assign]
    ops.index_sentences = definitions.index_sentences  # type: ignore[method-assign]
    return ops
