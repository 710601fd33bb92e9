# SPDX-License-Identifier: Apache-2.0
"""One layer of a served model with synthetic content, in the shapes of a decode step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sentencekv_vllm.ops.layer_ops import DecodeOutputs
from sentencekv_vllm.ops.rank_blocks import retention_factor
from sentencekv_vllm.ops.rotation import rotation
from sentencekv_vllm.types import Basis, Geometry, IndexKind, LayerPools, Reduce, SparseBatch

# The CPU only shows that the benchmark runs, in Triton's interpreter.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 16  # tokens
SINK_BLOCKS = 2
RECENT_BLOCKS = 8
SENTENCE_TOKENS = (8, 64)  # shortest, longest


@dataclass(frozen=True)
class Shape:
    """Attention heads of a model."""

    name: str
    num_query_heads: int
    num_kv_heads: int
    head_dim: int


SHAPES = {s.name: s for s in (Shape("Llama-3.1-8B", 32, 8, 128), Shape("Qwen3-32B", 64, 8, 128))}


class Layer:
    """Pools, batch and buffers of `requests` requests with `context` tokens each.

    Every request owns `context / BLOCK` pages of the swap pool, shuffled over it, and a
    working set of twice its budget.
    """

    def __init__(self, shape: Shape, context: int, requests: int, budget_tokens: int) -> None:
        self.shape, self.context, self.requests = shape, context, requests
        self._generator = torch.Generator(DEVICE).manual_seed(context + requests)
        heads, dim = shape.num_kv_heads, shape.head_dim
        history = context // BLOCK
        self.budget = budget_tokens // BLOCK - SINK_BLOCKS - RECENT_BLOCKS
        self.working_set = 2 * self.budget
        self.geometry = Geometry(
            num_layers=1,
            num_kv_heads=heads,
            group_size=shape.num_query_heads // heads,
            head_dim=dim,
            block_size=BLOCK,
            rows_per_page=BLOCK // SENTENCE_TOKENS[0],
            scale=dim**-0.5,
            code_width=dim,  # two bits of half the channels
        )
        # On a grid, so that a product with the basis is exact in any order and precision.
        self.query = (32 * self._normal(requests, shape.num_query_heads, dim)).round() / 32

        pages = requests * history
        kept_blocks = SINK_BLOCKS + RECENT_BLOCKS
        blocks = requests * (kept_blocks + self.working_set)
        block_ids = self._shuffled(blocks).view(requests, -1)
        sinks, recent, private = block_ids.split(
            [SINK_BLOCKS, RECENT_BLOCKS, self.working_set], dim=1
        )
        rows = pages * self.geometry.rows_per_page
        self.pools = LayerPools(
            cache=self._normal(blocks, heads, BLOCK, 2 * dim),
            host=self._host(pages),
            codes=self._integers(0, 256, (pages, heads, dim // 8, BLOCK), torch.uint8),
            scales=self._normal(pages, heads, BLOCK).abs() / 8,
            means=self._integers(-127, 128, (pages, heads, dim), torch.int8),
            mean_scales=self._normal(pages, heads).abs().float() / 64,
            page_kept=self._full((pages, heads), 0, torch.uint8),
            basis=self._basis(heads, dim),
            centroids=self._normal(rows, heads, dim),
            kept=self._full((rows, heads), 0, torch.uint8),
            page_slot=self._full((pages, heads), -1),
            slot_page=self._full((blocks, heads), -1),
            slot_stamp=self._full((blocks, heads), -1),
        )
        self.batch = self._make_batch(self._shuffled(pages).view(requests, -1), private)
        self.out = DecodeOutputs(
            head_tables=self._tables(sinks, recent),
            hits=self._full((requests,), 0, torch.int64),
            misses=self._full((requests,), 0, torch.int64),
            coverage=torch.zeros(requests, device=DEVICE),
            stage_ns=self._full((4,), 0, torch.int64),
        )
        self.seq_lens = self._full((requests,), self.out.head_tables.shape[2] * BLOCK)
        self.head_block_bytes = self.geometry.head_block_numel * 2

    def _make_batch(self, pages: Tensor, private: Tensor) -> SparseBatch:
        s, history = pages.shape
        lengths = self._integers(*SENTENCE_TOKENS, (s, self.context // SENTENCE_TOKENS[0]))
        ends = lengths.cumsum(1, dtype=torch.int32).clamp(max=self.context)
        return SparseBatch(
            pages=pages.contiguous(),
            num_pages=self._full((s,), history - RECENT_BLOCKS),
            row_pages=pages.contiguous(),
            sentence_ends=ends,
            num_sentences=(ends < self.context).sum(1, dtype=torch.int32) + 1,
            history_lo=self._full((s,), SINK_BLOCKS),
            history_hi=self._full((s,), history - RECENT_BLOCKS),
            budget_blocks=self._full((s,), self.budget),
            private_blocks=private.contiguous(),
            index_kind=self._full((s,), IndexKind.TOKEN_CODES),
            reduce=self._full((s,), Reduce.SOFTMAX_MEAN),
            retention=torch.full((s,), retention_factor(5.0), device=DEVICE),
            seed=self._full((s,), 1),
            step=0,
            token_codes_only=True,
        )

    def _tables(self, sinks: Tensor, recent: Tensor) -> Tensor:
        heads = self.shape.num_kv_heads
        selected = self._full((self.requests, self.budget), 0)
        blocks = torch.cat((sinks, selected, recent), 1)
        head = torch.arange(heads, dtype=torch.int32, device=DEVICE)
        return (blocks[:, None] * heads + head[:, None]).contiguous()

    def keep_resident(self, share: float, step: int) -> None:
        """Empty slots until `share` of what step `step` selected is resident, per KV head.

        What stays is no longer stamped with the step, so that the next step may evict it.
        """
        pools, private = self.pools, self.batch.private_blocks.long()
        stamps = pools.slot_stamp[private]  # [S, R, H]
        selected = stamps == step
        key = torch.rand(stamps.shape, device=DEVICE, generator=self._generator)
        order = key.masked_fill(~selected, 2.0).argsort(1).argsort(1)
        gone = (selected & (order < self.budget - round(share * self.budget))) | ~selected
        request, slot, head = gone.nonzero(as_tuple=True)
        block = private[request, slot]
        page = pools.slot_page[block, head].long()
        pools.page_slot[page[page >= 0], head[page >= 0]] = -1
        pools.slot_page[block, head] = -1
        pools.slot_stamp[block, head] = -1

    def saved_state(self) -> dict[str, Tensor]:
        """Copies of what a decode step changes."""
        names = ("page_slot", "slot_page", "slot_stamp", "kept", "page_kept")
        return {name: getattr(self.pools, name).clone() for name in names}

    def restore(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            getattr(self.pools, name).copy_(value)

    @staticmethod
    def _basis(heads: int, dim: int) -> Basis:
        """Signs of a Hadamard matrix for queries, an eighth each."""
        turn = rotation(dim).to(DEVICE).expand(heads, -1, -1).contiguous()
        return Basis(turn, turn.sign() / 8, torch.zeros(heads, dim, device=DEVICE), bits=2)

    def _host(self, pages: int) -> Tensor:
        """The swap pool, filled through the GPU, which is the faster generator."""
        heads, dim = self.shape.num_kv_heads, self.shape.head_dim
        host = torch.empty(
            (pages, heads, BLOCK, 2 * dim),
            dtype=torch.bfloat16,
            pin_memory=DEVICE == "cuda",
        )
        for part in host.split(4096):
            part.copy_(self._normal(*part.shape))
        return host

    def _normal(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_(
            generator=self._generator
        )

    def _integers(
        self, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype = torch.int32
    ) -> Tensor:
        return torch.randint(
            low, high, shape, dtype=dtype, device=DEVICE, generator=self._generator
        )

    def _full(self, shape: tuple[int, ...], value: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.full(shape, int(value), dtype=dtype, device=DEVICE)

    def _shuffled(self, count: int) -> Tensor:
        return torch.randperm(count, device=DEVICE, generator=self._generator).int()
