# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for Ampere and Hopper, and fits their registers."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "triton_compile_report.py"
MAX_SPILLED_BYTES = 64  # a thread; spills of that size stay in the L1 cache
REGISTERS = 65536  # of a multiprocessor
SHARED_BYTES = 163 * 1024  # what one program may use on sm_80, the smaller of the two


@pytest.fixture(scope="module")
def report():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_both_architectures(report):
    import sentencekv_vllm.triton_kernels as package

    entries = {  # kernels are private, the functions that they share are not
        node.name
        for path in Path(package.__path__[0]).glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.decorator_list and node.name[0] == "_"
    }
    assert entries
    for architecture in (80, 90):
        built = {"_" + row["kernel"] for row in report if row["architecture"] == architecture}
        assert built == entries


def test_registers_and_shared_memory_suffice(report):
    for row in report:
        assert row["registers"] * row["warps"] * 32 <= REGISTERS, row
        assert row["spilled_bytes"] <= MAX_SPILLED_BYTES, row
        assert row["shared_bytes"] <= SHARED_BYTES, row


def test_a_decode_program_leaves_room_for_others(report):
    """Loads hide behind other programs: at least two of the streaming kernels fit at once."""
    for row in report:
        if row["kernel"] in ("attend_split", "score_blocks", "swap_in"):
            assert 2 * row["registers"] * row["warps"] * 32 <= REGISTERS, row
            assert 2 * row["shared_bytes"] <= SHARED_BYTES, row


OF_A_SERVER = {  # the same in all steps
    *("cache_block_stride", "cache_head_stride", "first_stride", "private_stride"),
    *("key_block_stride", "key_head_stride", "key_token_stride"),
    *("value_block_stride", "value_head_stride", "value_token_stride"),
    *("num_private", "max_selected", "max_sentences", "max_pages"),
}


def test_no_step_compiles_a_kernel_anew_for_its_sizes():
    """Triton compiles anew, for a second, for an integer that becomes 1 or a multiple of 16."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "triton_specialised.py"
    done = subprocess.run(
        [sys.executable, "-P", str(script)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = dict(line.partition(" ")[::2] for line in done.stdout.splitlines())
    assert "_attend_split" in kernels
    for kernel, specialised in kernels.items():
        sizes = [n for n in specialised.split() if re.search("stride$|^max_|^num_(?!pages)", n)]
        sizes = [n for n in sizes if n not in ("num_sentences", "num_misses")]  # tensors
        if kernel.startswith("_"):
            assert set(sizes) <= OF_A_SERVER, kernel
