# SPDX-License-Identifier: Apache-2.0
"""The records as C structures of pointers (`csrc/cpu/args.hpp`), checked once each."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import Geometry, LayerPools, SparseBatch
from .layer_ops import DecodeOutputs
from .score_blocks import unit_factor

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
MAX_GROUP_SIZE = 64
MAX_CODE_WIDTH = 512

BATCH_VECTORS = (
    "num_pages",
    "num_sentences",
    "history_lo",
    "history_hi",
    "budget_blocks",
    "index_kind",
    "reduce",
    "retention",
    "seed",
)
# Tensors with a row per request, which may be part of wider ones, and the pitch of their rows.
BATCH_ROWS = {
    "pages": "pages_pitch",
    "row_pages": "row_pages_pitch",
    "sentence_ends": "sentences_pitch",
    "private_blocks": "private_pitch",
}


def _fields(ctype: type, *names: str) -> list[tuple[str, type]]:
    return [(name, ctype) for name in names]


class Pools(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_void_p, "cache", "host", "codes", "scales", "means", "mean_scales"),
        *_fields(ctypes.c_void_p, "page_kept", "key_map", "query_map", "center"),
        *_fields(ctypes.c_void_p, "centroids", "kept"),
        *_fields(ctypes.c_void_p, "page_slot", "slot_page", "slot_stamp", "spreads"),
        *_fields(ctypes.c_int64, "block_stride", "page_stride"),
        *_fields(ctypes.c_int64, "heads", "block_size", "head_dim", "code_width", "code_bits"),
        *_fields(ctypes.c_int64, "dtype"),
        *_fields(ctypes.c_int64, "host_dtype", "group_size", "host_head_bytes"),
    ]


class Batch(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_void_p, *BATCH_ROWS, *BATCH_VECTORS),
        *_fields(ctypes.c_int64, *BATCH_ROWS.values(), "requests", "working_set", "step"),
    ]


class Attention(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int64, "query_dtype", "group_size", "rows_per_page"),
        *_fields(ctypes.c_float, "scale", "unit"),
    ]


class Selected(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_void_p, "blocks", "coverage"),
        ("max_blocks", ctypes.c_int64),
    ]


class Outputs(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_void_p, "head_tables", "hits", "misses", "coverage", "stage_ns"),
        *_fields(ctypes.c_int64, "requests", "heads", "table_width"),
    ]


def check(name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Address of a contiguous CPU tensor of this dtype and shape (-1: any size).

    Raises:
        ValueError: it is something else.
    """
    fits = len(tensor.shape) == len(shape) and all(
        want in (-1, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype != dtype or not fits or not tensor.is_contiguous() or tensor.is_cuda:
        raise ValueError(
            f"{name} must be a contiguous CPU tensor of {dtype} and shape {list(shape)}; it is "
            f"{tensor.dtype} {list(tensor.shape)}, stride {tensor.stride()} on {tensor.device}"
        )
    return tensor.data_ptr()


def bind_pools(pools: LayerPools) -> Pools:
    """Raises ValueError where the C++ code could not walk the tensors."""
    blocks, heads, n, width = pools.cache.shape
    num_pages, dtype, form = len(pools.host), pools.cache.dtype, pools.host_format
    if dtype not in DTYPES or width % 16 or n % 16:
        raise ValueError(
            f"the cache must be bf16, fp16 or fp32 with block_size a multiple of 16 and head_dim "
            f"one of 8: it is {dtype} with block_size {n} and head_dim {width // 2}"
        )
    return Pools(
        cache=_head_major("cache", pools.cache, dtype, (blocks, heads, n, width)),
        host=_head_major("host", pools.host, dtype, (num_pages, heads, n, width))
        if form is None
        else _head_major(
            "host", pools.host, torch.uint8, (num_pages, heads, form.head_block_bytes)
        ),
        **_codes(pools, num_pages, heads, n, width // 2),
        **_rows(pools, heads, width // 2),
        page_slot=check("page_slot", pools.page_slot, torch.int32, (num_pages, heads)),
        slot_page=check("slot_page", pools.slot_page, torch.int32, (blocks, heads)),
        slot_stamp=check("slot_stamp", pools.slot_stamp, torch.int32, (blocks, heads)),
        block_stride=pools.cache.stride(0) * pools.cache.element_size(),
        page_stride=pools.host.stride(0) * pools.host.element_size(),
        heads=heads,
        block_size=n,
        head_dim=width // 2,
        dtype=DTYPES[dtype],
        host_dtype=0 if form is None else form.dtype,
        group_size=0 if form is None else form.group_size,
        host_head_bytes=n * width * pools.cache.element_size()
        if form is None
        else form.head_block_bytes,
    )


def _codes(pools: LayerPools, pages: int, heads: int, n: int, dim: int) -> dict[str, int]:
    if pools.codes is None:
        return {}
    width = 8 * pools.codes.shape[2]
    if width > MAX_CODE_WIDTH:
        raise ValueError(f"a token's code has at most {MAX_CODE_WIDTH} bits, not {width}")
    basis = pools.basis
    assert basis is not None and pools.scales is not None and pools.means is not None
    assert pools.mean_scales is not None and pools.page_kept is not None
    per_page = (pages, heads)
    return {
        "codes": check("codes", pools.codes, torch.uint8, (*per_page, width // 8, n)),
        "scales": check("scales", pools.scales, torch.bfloat16, (*per_page, n)),
        "means": check("means", pools.means, torch.int8, (*per_page, dim)),
        "mean_scales": check("mean_scales", pools.mean_scales, torch.float32, per_page),
        "page_kept": check("page_kept", pools.page_kept, torch.uint8, per_page),
        "key_map": check("key_map", basis.key_map, torch.float32, (heads, dim, dim)),
        "query_map": check("query_map", basis.query_map, torch.float32, (heads, dim, dim)),
        "center": check("center", basis.center, torch.float32, (heads, dim)),
        "code_width": width,
        "code_bits": basis.bits,
    }


def _rows(pools: LayerPools, heads: int, dim: int) -> dict[str, int]:
    if pools.centroids is None:
        return {}
    assert pools.kept is not None
    rows = {
        "centroids": check("centroids", pools.centroids, torch.bfloat16, (-1, heads, dim)),
        "kept": check("kept", pools.kept, torch.uint8, (-1, heads)),
    }
    if pools.spreads is not None:
        shape = tuple(pools.centroids.shape)
        rows["spreads"] = check("spreads", pools.spreads, torch.bfloat16, shape)
    return rows


def _head_major(name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> int:
    """`check` for memory whose blocks may lie further apart than they are large."""
    if len(tensor):
        check(f"each block of {name}", tensor[0], dtype, shape[1:])
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name} must be {dtype} {list(shape)}; it is {tensor.dtype} {list(tensor.shape)}"
        )
    return tensor.data_ptr()


def bind_batch(batch: SparseBatch) -> Batch:
    requests = len(batch.num_pages)
    values: dict[str, int] = {"requests": requests, "step": batch.step}
    for name in BATCH_VECTORS:
        dtype = torch.float32 if name == "retention" else torch.int32
        values[name] = check(name, getattr(batch, name), dtype, (requests,))
    for name, pitch in BATCH_ROWS.items():
        rows: Tensor = getattr(batch, name)
        if len(rows) != requests or rows.stride(1) != 1:
            check(name, rows, torch.int32, (requests, -1))
        values[name], values[pitch] = rows.data_ptr(), rows.stride(0)
    values["working_set"] = batch.private_blocks.shape[1]
    return Batch(**values)


def make_selected(pairs: int, max_blocks: int) -> Selected:
    """Room for the selections of `pairs` (request, KV head)."""
    blocks = torch.empty(pairs, max_blocks, dtype=torch.int32)
    coverage = torch.empty(pairs)
    selected = Selected(blocks.data_ptr(), coverage.data_ptr(), max_blocks)
    selected.pairs, selected.tensors = pairs, (blocks, coverage)
    return selected


def bind_attention(geometry: Geometry, dtype: torch.dtype) -> Attention:
    """For queries of `dtype`.

    Raises:
        ValueError: the C++ code has no such queries.
    """
    if geometry.group_size > MAX_GROUP_SIZE or dtype not in DTYPES:
        raise ValueError(
            f"queries must be bf16, fp16 or fp32 with at most {MAX_GROUP_SIZE} heads a "
            f"KV head: they are {dtype} with {geometry.group_size}"
        )
    return Attention(
        query_dtype=DTYPES[dtype],
        group_size=geometry.group_size,
        rows_per_page=geometry.rows_per_page,
        scale=geometry.scale,
        unit=unit_factor(geometry.scale),
    )


def bind_outputs(out: DecodeOutputs) -> Outputs:
    requests, heads, width = out.head_tables.shape
    return Outputs(
        head_tables=check("head_tables", out.head_tables, torch.int32, (requests, heads, width)),
        hits=check("hits", out.hits, torch.int64, (requests,)),
        misses=check("misses", out.misses, torch.int64, (requests,)),
        coverage=check("coverage", out.coverage, torch.float32, (requests,)),
        stage_ns=check("stage_ns", out.stage_ns, torch.int64, (4,)),
        requests=requests,
        heads=heads,
        table_width=width,
    )
