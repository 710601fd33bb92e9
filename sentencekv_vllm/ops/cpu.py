# SPDX-License-Identifier: Apache-2.0
"""The fused CPU ops: one C++ call per layer."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..types import Geometry, IndexKind, LayerPools, SparseBatch
from . import cpu_args as args
from .cpu_build import load_library
from .estimate_unselected import Attended
from .layer_ops import DecodeOutputs

Value = TypeVar("Value")

FAILURES = {
    1: "the budget is larger than what the sealed sentences cover: every history block must be "
    "touched by a sentence of `sentence_ends`",
    2: "the working set is smaller than one step's selection: give each request at least "
    "`budget_blocks` private blocks",
    3: "the pools have no index of this kind: keep codes (index_codes) or vectors (index_vectors)",
}


class CpuOps:
    """`LayerOps` in C++ (csrc/cpu), for tensors on the CPU.

    What TOKEN_CODES selects comes from the same integers as the reference's, given the same levels
    of the query; other floats are summed in another order. `stage_ns` is the time of all threads
    divided by their number.

    The records are checked and turned into C structures once per object, so they must keep
    their tensors. Not for concurrent calls from several Python threads.

    Raises:
        BuildError: the library cannot be built or loaded here.
    """

    name = "cpu"

    def __init__(self) -> None:
        library = load_library()
        self._limit_isa = library.sentencekv_cpu_limit_isa
        self._decode_layer = library.sentencekv_cpu_decode_layer
        self._decode_layer.argtypes = [ctypes.c_void_p] * 6
        self._reuse_selection = library.sentencekv_cpu_reuse_selection
        self._reuse_selection.argtypes = [ctypes.c_void_p] * 4
        self._estimate = library.sentencekv_cpu_estimate_unselected
        self._estimate.argtypes = [
            *[ctypes.c_void_p] * 4,
            ctypes.c_int64,
            *[ctypes.c_void_p] * 3,
            ctypes.c_float,
            *[ctypes.c_void_p] * 2,
        ]
        self._index_pages = library.sentencekv_cpu_index_pages
        self._index_pages.argtypes = [
            *[ctypes.c_void_p] * 3,
            ctypes.c_int64,
            ctypes.c_void_p,
        ]
        self._index_sentences = library.sentencekv_cpu_index_sentences
        self._index_sentences.argtypes = [
            *[ctypes.c_void_p] * 4,
            *[ctypes.c_int64] * 2,
            ctypes.c_void_p,
            ctypes.c_int32,
        ]
        self._pools = _PerObject(args.bind_pools)
        self._batch = _PerObject(args.bind_batch)
        self._outputs = _PerObject(args.bind_outputs)
        self._channels_first = _PerObject(_channels_first)
        self._tokens_first = _PerObject(lambda layout: layout.keys.to(torch.int32))
        self._attention: tuple[object, ...] = (None, None, None)
        self._selected = args.make_selected(0, 0)

    def limit_isa(self, isa: int) -> int:
        """Scan with at most this instruction set (0 portable, 1 AVX2, 2 AVX-512), for tests.

        Returns:
            The one in use.
        """
        return int(self._limit_isa(isa))

    def index_pages(
        self,
        pools: LayerPools,
        block_ids: Tensor,
        page_ids: Tensor,
        key_offset: Tensor,
    ) -> None:
        bound = self._pools(pools)
        count, n, dim = len(block_ids), bound.block_size, bound.head_dim
        blocks = args.check("block_ids", block_ids, torch.int32, (count,))
        pages = args.check("page_ids", page_ids, torch.int32, (count,))
        args.check("key_offset", key_offset, torch.int32, (n * dim,))
        self._index_pages(
            ctypes.byref(bound),
            blocks,
            pages,
            count,
            self._channels_first(key_offset, n).data_ptr(),
        )

    def index_sentences(
        self,
        pools: LayerPools,
        rows: Tensor,
        spans: Tensor,
        span_blocks: Tensor,
        key_offset: Tensor,
        kind: IndexKind = IndexKind.CENTROID,
    ) -> None:
        bound = self._pools(pools)
        count = len(rows)
        status = self._index_sentences(
            ctypes.byref(bound),
            args.check("rows", rows, torch.int32, (count,)),
            args.check("spans", spans, torch.int32, (count, 2)),
            args.check("span_blocks", span_blocks, torch.int32, (count, -1)),
            count,
            span_blocks.shape[1],
            args.check("key_offset", key_offset, torch.int32, (bound.block_size * bound.head_dim,)),
            kind,
        )
        if status:
            raise RuntimeError(FAILURES[status])

    def set_step(self, step: int) -> None:
        """Nothing: the batch has it."""

    def begin_step(self, batch: SparseBatch) -> None:
        """Nothing: a layer's call does all."""

    def decode_layer(
        self,
        geometry: Geometry,
        pools: LayerPools,
        batch: SparseBatch,
        query: Tensor,
        out: DecodeOutputs,
    ) -> None:
        p, b, o = self._pools(pools), self._batch(batch), self._outputs(out)
        attention = self._attention
        if attention[0] is not geometry or attention[1] is not query.dtype:
            attention = self._bind_attention(geometry, query.dtype)
        shape = (b.requests, p.heads * geometry.group_size, p.head_dim)
        if query.shape != shape or not query.is_contiguous():
            args.check("query", query, query.dtype, shape)
        if o.requests != b.requests or o.heads != p.heads:
            args.check("head_tables", out.head_tables, torch.int32, (b.requests, p.heads, -1))
        if not self._selected_fits(p, b):
            self._selected = args.make_selected(b.requests * p.heads, b.working_set)
        status = self._decode_layer(
            ctypes.byref(p),
            ctypes.byref(b),
            attention[2],
            ctypes.byref(self._selected),
            ctypes.byref(o),
            query.data_ptr(),
        )
        if status:
            raise RuntimeError(FAILURES[status])

    def reuse_selection(self, pools: LayerPools, batch: SparseBatch, out: DecodeOutputs) -> None:
        p, b, o = self._pools(pools), self._batch(batch), self._outputs(out)
        assert self._selected_fits(p, b), "a layer before this one ranks"
        status = self._reuse_selection(
            ctypes.byref(p), ctypes.byref(b), ctypes.byref(self._selected), ctypes.byref(o)
        )
        if status:
            raise RuntimeError(FAILURES[status])

    def estimate_unselected(
        self,
        geometry: Geometry,
        pools: LayerPools,
        batch: SparseBatch,
        estimates: Tensor,
        query: Tensor,
        attended: Attended,
        output: Tensor,
    ) -> None:
        p, b, tables = self._pools(pools), self._batch(batch), attended.head_tables
        shape = (b.requests, p.heads * geometry.group_size, p.head_dim)
        key_offset = self._tokens_first(attended.layout)
        assert pools.spreads is not None, "index_vectors is 2"
        self._estimate(
            ctypes.byref(p),
            ctypes.byref(b),
            ctypes.byref(args.bind_attention(geometry, query.dtype)),
            args.check("head_tables", tables, torch.int32, (b.requests, p.heads, -1)),
            tables.shape[2],
            args.check("seq_lens", attended.seq_lens, torch.int32, (b.requests,)),
            args.check("estimates", estimates, torch.bool, (b.requests,)),
            args.check("keys", key_offset, torch.int32, (p.block_size, p.head_dim)),
            attended.softcap,
            args.check("query", query, query.dtype, shape),
            args.check("output", output, query.dtype, shape),
        )

    def _selected_fits(self, pools: args.Pools, batch: args.Batch) -> bool:
        pairs, max_blocks = self._selected.pairs, self._selected.max_blocks
        return bool(batch.requests * pools.heads <= pairs and batch.working_set == max_blocks)

    def _bind_attention(self, geometry: Geometry, dtype: torch.dtype) -> tuple[object, ...]:
        bound = args.bind_attention(geometry, dtype)
        self._attention = (geometry, dtype, ctypes.byref(bound))
        return self._attention


def _channels_first(key_offset: Tensor, block_size: int) -> Tensor:
    return key_offset.view(block_size, -1).t().contiguous()


class _PerObject(Generic[Value]):
    """Values that are made once per object and dropped with it."""

    def __init__(self, make: Callable[..., Value]) -> None:
        self._make = make
        self._values: dict[int, Value] = {}

    def __call__(self, key: object, *parameters: int) -> Value:
        value = self._values.get(id(key))
        if value is None:
            value = self._values[id(key)] = self._make(key, *parameters)
            weakref.finalize(key, self._values.pop, id(key)).atexit = False
        return value
