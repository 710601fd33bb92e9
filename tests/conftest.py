# SPDX-License-Identifier: Apache-2.0
"""For every test: markers that skip with a reason, and Triton's interpreter without a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

HAS_GPU = torch.cuda.is_available()

settings.register_profile("shared-machine", deadline=None)  # times say nothing on a busy one
settings.load_profile("shared-machine")

if not HAS_GPU:
    # Before any test module imports vLLM, which imports Triton: it is read at that moment.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
