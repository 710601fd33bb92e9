# SPDX-License-Identifier: Apache-2.0
"""Start-up compiles every kernel that serving launches: no request waits for a compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parent / "launch_keys.py"


@pytest.mark.parametrize(
    ("ops", "vectors", "width", "host_dtype"),
    [
        ("CUDA", 2, 64, "auto"),
        ("CUDA", 0, 64, "auto"),
        ("Triton", 2, 64, "auto"),
        ("Triton", 0, 128, "int8"),
        ("Triton", 1, 0, "auto"),
    ],
)
def test_serving_launches_what_start_up_has_compiled(ops, vectors, width, host_dtype):
    """Whatever the numbers of requests, pages and sentences, the layer and the kind of index: an
    argument that differs between them must not be specialised, nor be a constexpr."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), ops, str(vectors), str(width), host_dtype],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    always = {"_attend_split", "_merge_splits", "_index_pages"}
    if vectors:
        always.add("_index_sentences")
    assert always <= {kernel for kernel, _ in found["compiled"]}
    assert not found["late"], "\n".join(f"{kernel}: {key}" for kernel, key in found["late"])
