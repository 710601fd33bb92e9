# SPDX-License-Identifier: Apache-2.0
"""Estimation of what is left out: exact for equal tokens, better than nothing for similar ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from sentencekv_vllm.ops.cpu import CpuOps
from sentencekv_vllm.ops.estimate_unselected import Attended, attended_lse, estimate_unselected
from sentencekv_vllm.ops.index_sentences import index_sentences
from sentencekv_vllm.ops.layer_ops import LayerOps, ReferenceOps
from sentencekv_vllm.ops.mean_values import GroupTokens, write_mean_values
from sentencekv_vllm.ops.token_layout import TokenLayout
from sentencekv_vllm.types import IndexKind, LayerPools, Reduce
from sentencekv_vllm.worker.tables import NewSentences

from .layer_cases import Case, Layer, Row, build, copy_pools

BITS, CENTROID, RANDOM = IndexKind.TOKEN_CODES, IndexKind.CENTROID, IndexKind.RANDOM
OPS = [ReferenceOps, CpuOps]


def layout_of(layer: Layer) -> TokenLayout:
    """The case's keys are scattered over the head-block; values fill the other places."""
    n, d = layer.geometry.block_size, layer.geometry.head_dim
    free = torch.ones(2 * n * d, dtype=torch.bool)
    free[layer.key_offset.long()] = False
    return TokenLayout(layer.key_offset.long().view(n, d), free.nonzero().view(n, d))


def sentences_of(layer: Layer, s: int) -> tuple[Tensor, NewSentences]:
    """(ends, sentences) of request s, whose blocks are the pages of the swap pool."""
    batch, n, m = layer.batch, layer.geometry.block_size, layer.geometry.rows_per_page
    ends = batch.sentence_ends[s, : int(batch.num_sentences[s])].numpy()
    starts = np.concatenate(([0], ends[:-1]))
    first = starts // n
    columns = first[:, None] + np.arange(int(((ends - 1) // n - first).max()) + 1)
    pages = batch.pages[s, : int(batch.num_pages[s])].numpy()
    i = np.arange(len(ends))
    rows = (batch.row_pages[s].numpy()[i // m] * m + i % m).astype(np.int32)
    spans = np.stack((starts % n, ends - starts), 1).astype(np.int32)
    blocks = pages[columns.clip(max=len(pages) - 1)].astype(np.int32)
    return torch.from_numpy(ends), NewSentences(rows, spans, blocks, CENTROID, True)


@dataclass(frozen=True)
class Scene:
    """A layer whose tokens within a sentence differ by `noise`, with mean keys and values."""

    layer: Layer
    layout: TokenLayout
    tokens: list[Tensor]  # [H, T, 2D] of each request

    @staticmethod
    def make(case: Case, noise: float) -> Scene:
        layer = build(case)
        layout, pools, n = layout_of(layer), layer.pools, layer.geometry.block_size
        generator = torch.Generator().manual_seed(case.seed + 1)
        hosts = replace(pools, cache=pools.host)
        everything = []
        for s in range(len(case.rows)):
            ends, new = sentences_of(layer, s)
            total, d2 = int(ends[-1]), 2 * case.dim
            number = torch.bucketize(torch.arange(total), ends, right=True)
            tokens = torch.randn(case.heads, len(ends), d2, generator=generator)[:, number]
            tokens = tokens + noise * torch.randn(tokens.shape, generator=generator)
            tokens = tokens.bfloat16().to(case.dtype)
            pages = layer.batch.pages[s, : total // n].long()
            content = tokens.unflatten(1, (-1, n)).transpose(0, 1)  # [blocks, H, N, 2D]
            flat = torch.empty_like(pools.host[pages]).flatten(2)
            flat[..., layout.tokens.flatten()] = content.flatten(2)
            pools.host[pages] = flat.view_as(pools.host[pages])
            rows, spans, blocks = map(torch.from_numpy, (new.rows, new.spans, new.span_blocks))
            index_sentences(hosts, rows, spans, blocks, layer.key_offset)
            groups = GroupTokens(*map(torch.from_numpy, new.tokens(n)))
            write_mean_values(hosts, rows, groups, layout)
            everything.append(tokens)
        return Scene(layer, layout, everything)

    def attend(
        self, ops: LayerOps, query: Tensor, softcap: float = 0.0
    ) -> tuple[LayerPools, Attended, Tensor]:
        """What a step attends to, and its output: sinks, the selection, the recent blocks."""
        layer, g = self.layer, self.layer.geometry
        pools, batch = copy_pools(layer.pools), layer.batch
        out = layer.outputs()
        ops.decode_layer(g, pools, batch, query, out)
        used = set(batch.private_blocks.flatten().tolist())
        spare = iter([b for b in range(len(pools.cache)) if b not in used])
        tables, lengths = out.head_tables.clamp(min=0), []
        for s in range(len(batch.num_pages)):
            lo, hi = int(batch.history_lo[s]), int(batch.history_hi[s])
            budget, count = int(batch.budget_blocks[s]), int(batch.num_pages[s])
            places = [*range(lo), *range(lo + budget, lo + budget + count - hi)]
            for column, block in zip(places, [*range(lo), *range(hi, count)], strict=True):
                slot = next(spare)
                pools.cache[slot] = pools.host[int(batch.pages[s, block])]
                tables[s, :, column] = slot * g.num_kv_heads + torch.arange(g.num_kv_heads)
            lengths.append((lo + budget + count - hi) * g.block_size)
        seq_lens = torch.tensor(lengths, dtype=torch.int32)
        output = torch.empty_like(query)
        for s, length in enumerate(lengths):
            blocks = tables[s, :, : length // g.block_size].long() // g.num_kv_heads
            flat = pools.cache.flatten(2)[blocks, torch.arange(g.num_kv_heads)[:, None]]
            tokens = flat[..., self.layout.tokens].flatten(1, 2)  # [H, T, 2D]
            output[s] = self.softmax(query[s], tokens, softcap)
        return pools, Attended(tables, seq_lens, self.layout, None, softcap), output

    def softmax(self, query: Tensor, tokens: Tensor, softcap: float = 0.0) -> Tensor:
        """Attention of one request's query [Hq, D] over [H, T, 2D], in double precision."""
        g = self.layer.geometry
        keys, values = tokens.double().chunk(2, -1)
        logits = g.scale * query.double().unflatten(0, (g.num_kv_heads, -1)) @ keys.mT
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        return (logits.softmax(-1) @ values).flatten(0, 1).to(query.dtype)

    def dense(self, query: Tensor, softcap: float = 0.0) -> Tensor:
        pairs = zip(query, self.tokens, strict=True)
        return torch.stack([self.softmax(q, tokens, softcap) for q, tokens in pairs])


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_dense_attention_is_restored_where_the_tokens_of_a_sentence_are_equal(ops, softcap):
    rows = (Row(577, 3, BITS), Row(1400, 6, CENTROID, Reduce.MEAN, 0), Row(300, 2, RANDOM))
    scene = Scene.make(Case(rows, dtype=torch.float32, dim=64), noise=0)
    query, ops = scene.layer.query(3), ops()
    pools, attended, output = scene.attend(ops, query, softcap)
    dense = scene.dense(query, softcap)
    assert float((output - dense).abs().max()) > 0.1, "something is left out"
    wanted = torch.ones(len(rows), dtype=torch.bool)
    ops.estimate_unselected(
        scene.layer.geometry, pools, scene.layer.batch, wanted, query, attended, output
    )
    torch.testing.assert_close(output, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ops", OPS)
def test_rows_that_do_not_ask_or_leave_nothing_out_keep_their_output(ops):
    rows = (Row(577, 3), Row(577, None), Row(900, 4))
    scene = Scene.make(Case(rows), noise=1)
    query, ops = scene.layer.query(4), ops()
    pools, attended, output = scene.attend(ops, query)
    before, wanted = output.clone(), torch.tensor([False, True, True])
    ops.estimate_unselected(
        scene.layer.geometry, pools, scene.layer.batch, wanted, query, attended, output
    )
    assert torch.equal(output[:2], before[:2])
    assert not torch.equal(output[2], before[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cpp_estimates_what_the_reference_does(dtype):
    rows = (Row(1100, 5), Row(700, 3, CENTROID, Reduce.MEAN, 0), Row(64, 1))
    case = Case(rows, dtype=dtype, group=3, dim=80, spread=dtype is torch.float32, seed=2)
    scene = Scene.make(case, noise=0.7)
    query, ops = scene.layer.query(5), CpuOps()
    pools, attended, output = scene.attend(ops, query)
    others = output.clone()
    wanted = torch.ones(len(rows), dtype=torch.bool)
    given = (scene.layer.geometry, pools, scene.layer.batch)
    ops.estimate_unselected(*given, wanted, query, attended, output)
    lse = attended_lse(scene.layer.geometry, pools.cache, query, attended)
    told = replace(attended, lse=lse)  # as on CUDA
    estimate_unselected(*given, scene.layer.batch.step, wanted, query, told, others)
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(output, others, rtol=tolerance, atol=tolerance)


def test_similar_tokens_bring_the_output_nearer_to_dense_attention():
    scene = Scene.make(Case((Row(1900, 6, sentences=90),), dtype=torch.float32), noise=0.5)
    query, ops = 0.3 * scene.layer.query(6), CpuOps()  # diffuse
    pools, attended, output = scene.attend(ops, query)
    dense = scene.dense(query)
    before = float((output - dense).norm())
    ops.estimate_unselected(
        scene.layer.geometry,
        pools,
        scene.layer.batch,
        torch.tensor([True]),
        query,
        attended,
        output,
    )
    assert float((output - dense).norm()) < 0.3 * before


def test_mean_values_are_those_of_the_sentences_tokens():
    scene = Scene.make(Case((Row(577), Row(300)), dtype=torch.float32), noise=1)
    for s, tokens in enumerate(scene.tokens):
        ends, new = sentences_of(scene.layer, s)
        starts = [0, *ends.tolist()[:-1]]
        values = tokens.chunk(2, -1)[1]
        means = torch.stack([values[:, a:b].mean(1) for a, b in zip(starts, ends, strict=True)])
        written = scene.layer.pools.spreads[torch.from_numpy(new.rows).long()].float()
        torch.testing.assert_close(written, means, rtol=2**-8, atol=1e-5)
