# SPDX-License-Identifier: Apache-2.0
"""The implementation of `LayerOps` for a device."""

from __future__ import annotations

import logging
from functools import cache

from .layer_ops import LayerOps, ReferenceOps
from .native_build import BuildError

logger = logging.getLogger(__name__)


@cache
def load_layer_ops(device_type: str) -> LayerOps:
    """The fastest ops that work here, one instance per process.

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
