# SPDX-License-Identifier: Apache-2.0
"""What must hold on this GPU before anything is timed."""

from __future__ import annotations

import torch
from gpu_clock import capture
from gpu_layer import DEVICE, SHAPES, Layer
from gpu_step import Step, implementations
from torch import Tensor

from sentencekv_vllm.ops.sparse_decode import sparse_decode

HIT_RATE = 0.8


def failures(context: int = 4096) -> list[str]:
    """Sentences about what is wrong, none if all is well."""
    found = []
    eager: dict[str, dict[str, Tensor]] = {}
    for name, make_ops in implementations().items():
        step = Step(Layer(SHAPES["Llama-3.1-8B"], context, 3, 512), make_ops)
        restore = step.at_hit_rate(HIT_RATE)
        step.run()
        eager[name] = step.results()
        found += [f"{name}: {failure}" for failure in _wrong_contents(step)]
        graph = capture(step.run, restore)
        restore()
        graph.replay()
        found += [
            f"{name}: a graph replay leaves another {tensor} than the eager step"
            for tensor in _differences(eager[name], step.results())
        ]
    for name in set(eager) - {"Triton"}:
        found += [
            f"{name}: another {tensor} than Triton's"
            for tensor in _differences(eager["Triton"], eager[name])
        ]
    return found


def _differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return [name for name in a if not torch.equal(a[name], b[name])]


def _wrong_contents(step: Step) -> list[str]:
    """The selected slots hold their pages, and attention over them equals its definition."""
    layer, found = step.layer, []
    heads = layer.geometry.num_kv_heads
    tables = layer.out.head_tables.long()
    lo = int(layer.batch.history_lo[0])
    selected = tables[..., lo : lo + layer.budget]
    slots, head = selected // heads, selected % heads
    pages = layer.pools.slot_page[slots, head].long()
    if not bool((pages >= 0).all()):
        return ["a selected slot holds no page"]
    expected = layer.pools.host[pages.cpu(), head.cpu()].to(DEVICE)
    if not torch.equal(layer.pools.cache[slots, head], expected):
        found.append("a selected slot does not hold its page's bytes")
    keys, values = layer.pools.cache.chunk(2, dim=-1)
    output, lse = sparse_decode(
        layer.query, keys, values, layer.out.head_tables, layer.seq_lens, layer.geometry.scale
    )
    try:
        torch.testing.assert_close(step.output, output, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(step.lse, lse, rtol=1e-3, atol=1e-3)
    except AssertionError as error:
        found.append(f"attention differs from its definition: {error}")
    return found
