# SPDX-License-Identifier: Apache-2.0
"""Compile every Triton kernel as its launchers call it, without a GPU; print what it takes.

Run as `python -P tests/ops/triton_compile_report.py` without TRITON_INTERPRET: one JSON line
per kernel, shape and architecture. A process of its own, since Triton is either compiled or
interpreted throughout.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from sentencekv_vllm.host_format import GROUP_SIZES, HostDtype, host_format
from sentencekv_vllm.ops.layer_ops import DecodeOutputs
from sentencekv_vllm.triton_kernels.layer_ops import TritonOps
from sentencekv_vllm.triton_kernels.sparse_decode import DecodeScratch, sparse_decode
from sentencekv_vllm.triton_kernels.workspace import Workspace
from sentencekv_vllm.types import Basis, Geometry, IndexKind, LayerPools, SparseBatch

ARCHITECTURES = (80, 90)
SHAPES = (
    # head_dim, group, block_size, width and bits of codes, blocks of the longest request, selected
    # blocks, dtype
    (64, 1, 16, 64, 1, 512, 64, torch.float16),
    (80, 7, 48, 80, 2, 512, 64, torch.bfloat16),
    (128, 4, 16, 128, 2, 32768, 256, torch.bfloat16),
    (128, 4, 32, 128, 2, 4096, 256, torch.bfloat16),
    (256, 16, 128, 512, 2, 1024, 16, torch.bfloat16),
)


class Absent:
    """A driver for a GPU that is not here; the device number is the architecture."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {
        "registers": int(found["REG"]),
        # What does not fit the registers lies in the stack frame.
        "spilled_bytes": int(found["STACK"]) + int(found["LOCAL"]),
    }


def launch_all(
    head_dim: int,
    group: int,
    n: int,
    width: int,
    bits: int,
    max_pages: int,
    selected: int,
    dtype: torch.dtype,
) -> None:
    """Every launcher once, over uninitialised tensors of real shapes."""
    s, h, m = 4, 8, 4
    pages, blocks, sentences = 64, 64, min(8192, max_pages * 2)
    geometry = Geometry(1, h, group, head_dim, n, m, head_dim**-0.5, 2, width)
    i32, u8, bf16 = torch.int32, torch.uint8, torch.bfloat16
    maps = torch.empty(2, h, head_dim, head_dim)
    pools = LayerPools(
        cache=torch.empty(blocks, h, n, 2 * head_dim, dtype=dtype),
        host=torch.empty(pages, h, n, 2 * head_dim, dtype=dtype),
        codes=torch.empty(pages, h, width // 8, n, dtype=u8),
        scales=torch.empty(pages, h, n, dtype=bf16),
        means=torch.empty(pages, h, head_dim, dtype=torch.int8),
        mean_scales=torch.empty(pages, h),
        page_kept=torch.empty(pages, h, dtype=u8),
        basis=Basis(maps[0], maps[1], torch.empty(h, head_dim), bits),
        centroids=torch.empty(pages * m, h, head_dim, dtype=bf16),
        kept=torch.empty(pages * m, h, dtype=u8),
        page_slot=torch.empty(pages, h, dtype=i32),
        slot_page=torch.empty(blocks, h, dtype=i32),
        slot_stamp=torch.empty(blocks, h, dtype=i32),
        spreads=torch.empty(pages * m, h, head_dim, dtype=bf16),
    )
    shapes = {
        "pages": (s, max_pages),
        "row_pages": (s, sentences // m),
        "sentence_ends": (s, sentences),
        "private_blocks": (s, selected),
    }
    batch = SparseBatch(
        **{
            field.name: torch.empty(
                shapes.get(field.name, (s,)),
                dtype=torch.float32 if field.name == "retention" else i32,
            )
            for field in fields(SparseBatch)
            if field.name not in ("step", "token_codes_only")
        },
        step=3,
    )
    width = selected + 16
    out = DecodeOutputs(
        head_tables=torch.empty(s, h, width, dtype=i32),
        hits=torch.empty(s, dtype=torch.int64),
        misses=torch.empty(s, dtype=torch.int64),
        coverage=torch.empty(s),
        stage_ns=torch.empty(4, dtype=torch.int64),
    )
    query = torch.empty(s, h * group, head_dim, dtype=dtype)
    device = torch.device("cpu")
    ids = torch.empty(5, dtype=i32)
    ops = TritonOps(Workspace.allocate(geometry, s, max_pages, sentences, selected, device))
    ops.index_pages(pools, ids, ids, ids)
    for kind in (IndexKind.CENTROID, IndexKind.BOUNDS, IndexKind.MEAN_STD):
        ops.index_sentences(pools, ids, ids.expand(2, 5), ids.expand(3, 5), ids, kind)
    ops.begin_step(batch)
    ops.decode_layer(geometry, pools, batch, query, out)
    for host_dtype in HostDtype if head_dim % GROUP_SIZES[-1] == 0 else ():
        form = host_format(host_dtype.name.lower(), n, head_dim, dtype.itemsize)
        assert form is not None
        stored = torch.empty(pages, h, form.head_block_bytes, dtype=u8)
        coarse = replace(pools, host=stored, host_format=form)
        ops.index_pages(coarse, ids, ids, ids)
        ops.swap_in(coarse, batch)
    sparse_decode(
        query,
        *pools.cache.split(head_dim, -1),
        out.head_tables,
        batch.num_pages,
        geometry.scale,
        DecodeScratch.allocate(s, h * group, head_dim, width * n, device),
        torch.empty_like(query),
        torch.empty(s, h * group),
    )


def report() -> Iterator[dict[str, Any]]:
    run = JITFunction.run
    compiled: list[tuple[str, Any]] = []

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> None:
        compiled.append((self.__name__, run(self, *args, **{**kwargs, "warmup": True})))

    JITFunction.run = compile_only
    for architecture in ARCHITECTURES:
        driver.set_active(Absent(architecture))
        for shape in SHAPES:
            compiled.clear()
            launch_all(*shape)
            for name, kernel in compiled:
                yield {
                    "kernel": name.lstrip("_"),
                    "architecture": architecture,
                    "head_dim": shape[0],
                    "group": shape[1],
                    "block_size": shape[2],
                    "warps": kernel.metadata.num_warps,
                    "shared_bytes": kernel.metadata.shared,
                    **resources(kernel.asm["cubin"]),
                }


if __name__ == "__main__":
    for row in report():
        print(json.dumps(row), flush=True)
