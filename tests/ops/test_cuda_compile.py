# SPDX-License-Identifier: Apache-2.0
"""nvcc accepts the kernels for every architecture, and they fit the registers."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from sentencekv_vllm.ops.cuda import load
from sentencekv_vllm.ops.cuda_build import (
    ARCHITECTURES,
    build_cuda,
    cuda_sources,
    find_nvcc,
    nvcc_command,
)
from sentencekv_vllm.ops.native_build import BuildError

try:
    find_nvcc()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)

MAX_REGISTERS = {  # a thread, of 65536 a multiprocessor
    "resolve_residency": 64,
    "gather_misses": 64,
    "copy_pages": 64,
    "quantize_query": 128,  # its 512 threads; there are fewer blocks than multiprocessors
    "score_blocks": 224,  # of 256 planes; 80 for groups of 4 and 128 planes, so 24 warps
    "rank": 128,  # as for the queries
    "decode_selection": 128,
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, int]]:
    """(kernel, architecture) -> registers and bytes of stack and spills, from ptxas; of a template
    the most that an instance takes."""
    command = nvcc_command(cuda_sources(), tmp_path_factory.mktemp("nvcc") / "kernels.so")
    done = subprocess.run([*command, "-Xptxas=-v"], capture_output=True, text=True, check=True)
    entries = re.findall(
        r"entry function '\w+?(\d\w+?)_kernelE?\w*' for 'sm_(\d+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        done.stdout + done.stderr,
        re.S,
    )
    most: dict[tuple[str, int], dict[str, int]] = {}
    for name, arch, stack, stores, loads, registers in entries:
        use = {
            "stack": int(stack), "spilled": int(stores) + int(loads), "registers": int(registers)
        }  # fmt: skip
        known = most.setdefault((re.sub(r".*?\d", "", name), int(arch)), use)
        known.update({key: max(value, known[key]) for key, value in use.items()})
    return most


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", MAX_REGISTERS)
def test_a_kernel_spills_nothing_and_keeps_its_register_bound(report, kernel, arch) -> None:
    use = report[kernel, arch]
    print(f"{kernel} sm_{arch}: {use}")
    assert use["stack"] == use["spilled"] == 0
    assert use["registers"] <= MAX_REGISTERS[kernel]


def test_the_library_loads_without_a_gpu_and_needs_no_other_cuda_library() -> None:
    path = build_cuda()
    assert load(path).sentencekv_error_string(1) == b"invalid argument"
    # vLLM preloads torch's OpenMP, which ldd would list.
    bare = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    ldd = subprocess.run(["ldd", path], capture_output=True, text=True, check=True, env=bare)
    needed = ldd.stdout
    assert "libcudart" not in needed and "torch" not in needed


def test_the_newest_architecture_is_also_there_as_ptx() -> None:
    command = nvcc_command([], Path("x"))
    newest = ARCHITECTURES[-1]
    assert f"-gencode=arch=compute_{newest},code=compute_{newest}" in command
