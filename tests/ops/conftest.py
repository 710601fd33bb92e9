# SPDX-License-Identifier: Apache-2.0
"""Random layers and batches for the Triton kernels, and the device that they run on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sentencekv_vllm.host_format import host_format
from sentencekv_vllm.ops.cuda import Launcher, library, load
from sentencekv_vllm.ops.cuda_build import cuda_sources
from sentencekv_vllm.ops.custom_ops import SCHEMAS
from sentencekv_vllm.ops.native_build import build as build_library
from sentencekv_vllm.ops.native_build import csrc_dir
from sentencekv_vllm.ops.pack_keys import pack_keys
from sentencekv_vllm.ops.quantize_pages import quantize_pages
from sentencekv_vllm.types import Basis, Geometry, IndexKind, LayerPools, Reduce, SparseBatch


@dataclass(frozen=True)
class Row:
    """One request of a batch. Sentences are drawn at random unless `ends` gives them."""

    tokens: int = 577
    budget: int = 6
    sinks: int = 1
    recent: int = 2
    kind: IndexKind = IndexKind.TOKEN_CODES
    reduce: Reduce = Reduce.SOFTMAX_MEAN
    retention: float = 1.0  # added to a score; what multiplies a block's under TOKEN_CODES
    ends: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Case:
    geometry: Geometry
    pools: LayerPools
    batch: SparseBatch
    query: torch.Tensor  # [S, H * G, D]

    def to(self, device: str) -> Case:
        """A copy on `device`; the swap pool stays in (pinned) host memory."""

        def move(record: Any) -> Any:
            tensors: dict[str, Any] = {
                field.name: value.to(device, copy=True)
                for field in fields(record)
                if isinstance(value := getattr(record, field.name), torch.Tensor)
            }
            if getattr(record, "basis", None) is not None:
                tensors["basis"] = move(record.basis)
            if device != "cpu" and "host" in tensors:
                tensors["host"] = record.host.clone().pin_memory()
            return replace(record, **tensors)

        return Case(self.geometry, move(self.pools), move(self.batch), self.query.to(device))


def draw_ends(row: Row, generator: torch.Generator) -> tuple[int, ...]:
    if row.ends is not None:
        return row.ends
    lengths = torch.randint(1, 18, (row.tokens,), generator=generator).cumsum(0)
    return (*lengths[lengths < row.tokens].tolist(), row.tokens) if row.tokens else ()


def draw_basis(heads: int, dim: int, bits: int, generator: torch.Generator) -> Basis:
    """Rotated and stretched, otherwise for each KV head."""
    turn = torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator)).Q
    stretch = (torch.randn(heads, 1, dim, generator=generator) / 2).exp()
    center = torch.randn(heads, dim, generator=generator)
    return Basis((turn * stretch).contiguous(), (turn / stretch).contiguous(), center, bits)


def make_case(
    *rows: Row,
    head_dim: int = 64,
    channels: int | None = None,
    bits: int = 2,
    codes: bool = True,
    vectors: int = 2,
    heads: int = 2,
    group: int = 4,
    block_size: int = 16,
    private: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    host_dtype: str = "auto",
    seed: int = 0,
) -> Case:
    """A layer in which every request of `rows` is fully indexed; memory of no one is NaN.

    Args:
        channels: that have codes; None: all with one bit, half with two.
        codes, vectors: what the server keeps.
    """
    generator = torch.Generator().manual_seed(seed)
    ends = [draw_ends(row, generator) for row in rows]
    counts = [row.tokens // block_size for row in rows]
    max_pages, max_sentences = max(1, *counts), max(1, *map(len, ends))
    num_pages, num_blocks, m = sum(counts) + 3, len(rows) * private + 2, block_size
    geometry = Geometry(
        1,
        heads,
        group,
        head_dim,
        block_size,
        rows_per_page=m,
        scale=head_dim**-0.5,
        vectors_per_row=vectors,
        code_width=bits * (channels or head_dim // (8 * bits) * 8) if codes else 0,
    )
    basis = draw_basis(heads, head_dim, bits, generator)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    host = normal(num_pages, heads, block_size, 2 * head_dim)
    packed = pack_keys(host[..., :head_dim], basis, geometry.code_width or 8 * bits)
    centroids = normal(num_pages * m, heads, head_dim).to(torch.bfloat16)
    spreads = normal(num_pages * m, heads, head_dim).abs().to(torch.bfloat16)
    form = host_format(host_dtype, block_size, head_dim, dtype.itemsize)
    order = torch.randperm(num_pages, generator=generator).int()
    pages = torch.zeros(len(rows), max_pages, dtype=torch.int32)
    row_pages = torch.zeros(len(rows), -(-max_sentences // m), dtype=torch.int32)
    sentence_ends = torch.zeros(len(rows), max_sentences, dtype=torch.int32)
    used = 0
    for s, count in enumerate(counts):
        pages[s, :count] = order[used : used + count]
        need = -(-len(ends[s]) // m)
        row_pages[s, :need] = order[used : used + need]
        sentence_ends[s, : len(ends[s])] = torch.tensor(ends[s], dtype=torch.int32)
        used += count
    packed.scales[order[used:]] = float("nan")
    packed.mean_scales[order[used:]] = float("nan")
    for summaries in (centroids, spreads):
        summaries.unflatten(0, (num_pages, m))[order[used:]] = float("nan")
    lo = [min(row.sinks, count) for row, count in zip(rows, counts, strict=True)]
    hi = [
        max(start, count - row.recent) for row, count, start in zip(rows, counts, lo, strict=True)
    ]
    blocks = torch.randperm(num_blocks, generator=generator).int()[: len(rows) * private]
    kept = torch.randint(0, 2, (num_pages * m, heads), generator=generator).to(torch.uint8)

    def column(values: list[Any], kind: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=kind)

    batch = SparseBatch(
        pages=pages,
        num_pages=column(counts),
        row_pages=row_pages,
        sentence_ends=sentence_ends,
        num_sentences=column([len(e) for e in ends]),
        history_lo=column(lo),
        history_hi=column(hi),
        budget_blocks=column([min(r.budget, b - a) for r, a, b in zip(rows, lo, hi, strict=True)]),
        private_blocks=blocks.reshape(len(rows), private),
        index_kind=column([int(row.kind) for row in rows]),
        reduce=column([int(row.reduce) for row in rows]),
        retention=column([row.retention for row in rows], torch.float32),
        seed=column([7 * s - 3 for s in range(len(rows))]),
        step=5,
    )
    page_kept = torch.randint(0, 2, (num_pages, heads), generator=generator).to(torch.uint8)
    index: dict[str, Any] = {}
    if codes:
        index = {**vars(packed), "page_kept": page_kept, "basis": basis}
    if vectors:
        index |= {"centroids": centroids, "kept": kept}
    if vectors == 2:
        index["spreads"] = spreads
    pools = LayerPools(
        cache=torch.full((num_blocks, heads, block_size, 2 * head_dim), float("nan"), dtype=dtype),
        host=host if form is None else quantize_pages(host, form),
        page_slot=torch.full((num_pages, heads), -1, dtype=torch.int32),
        slot_page=torch.full((num_blocks, heads), -1, dtype=torch.int32),
        slot_stamp=torch.full((num_blocks, heads), -1, dtype=torch.int32),
        host_format=form,
        **index,
    )
    return Case(geometry, pools, batch, normal(len(rows), heads * group, head_dim))


@pytest.fixture
def build():
    """`build(*rows, head_dim=..., ...)` -> Case on the CPU; rows come from `build.row(...)`."""
    make_case.row = Row  # type: ignore[attr-defined]  # test modules cannot import this file
    return make_case


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> str:
    """Device on which Triton kernels run here: native on CUDA, interpreted on the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    multiply = InterpreterBuilder.create_dot

    def multiply_widened(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        # Triton 3.9 multiplies the bit patterns of bf16; float32 products of bf16 are exact.
        wide = [
            self.create_fp_ext(x, tl.float32) if x.dtype.scalar.is_bf16() else x for x in (a, b)
        ]
        return multiply(self, *wide, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", multiply_widened)
    return "cpu"


def make_workspace(case: Case, device: str) -> Any:
    """A workspace larger than the batch, poisoned where it holds no state."""
    from sentencekv_vllm.triton_kernels.ordered import LOWEST
    from sentencekv_vllm.triton_kernels.workspace import Workspace

    batch = case.batch
    requests, pages = batch.pages.shape
    work = Workspace.allocate(
        case.geometry,
        requests + 1,
        pages + 2,
        batch.sentence_ends.shape[1] + 5,
        batch.private_blocks.shape[1],
        torch.device(device),
    )
    for field in fields(work):
        buffer = getattr(work, field.name)
        buffer.fill_(float("nan") if buffer.is_floating_point() else 99)
    work.best.fill_(LOWEST)
    work.step.fill_(batch.step)
    work.num_misses.zero_()
    return work


@pytest.fixture
def workspace():
    """`workspace(case, device)` -> poisoned Workspace."""
    return make_workspace


@pytest.fixture(scope="session")
def host_command() -> Callable[[list[Path], Path], list[str]]:
    """(sources, output) -> the command that compiles CUDA sources for the host."""
    folders = [csrc_dir() / "host_cuda", csrc_dir() / "include"]
    return lambda sources, output: [
        *("g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Werror"),
        *("-Wno-unknown-pragmas", *(f"-I{f}" for f in folders), "-x", "c++"),
        *(*map(str, sources), "-o", str(output)),
    ]


@pytest.fixture(scope="session")
def host_kernels(host_command) -> Launcher:
    """The CUDA kernels compiled for the host, for CPU tensors."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folders = [csrc_dir() / "host_cuda", csrc_dir() / "include"]
    return Launcher(
        load(build_library("sentencekv_cuda_host", cuda_sources(), host_command, folders))
    )


@pytest.fixture
def host_ops(host_kernels) -> Iterator[None]:
    """`torch.ops.sentencekv` takes CPU tensors, with the host's kernels behind it."""
    with torch.library._scoped_library("sentencekv", "IMPL") as ops:
        for name in SCHEMAS:
            ops.impl(name, getattr(host_kernels, name), "CPU")
        yield


@pytest.fixture
def cuda_kernels(kernels, request: pytest.FixtureRequest) -> str:
    """Device on which both Triton's and our CUDA kernels run here; see `kernels`."""
    if kernels == "cpu":
        request.getfixturevalue("host_ops")
    elif library() is None:
        pytest.skip("needs nvcc")
    return kernels
