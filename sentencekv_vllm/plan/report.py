# SPDX-License-Identifier: Apache-2.0
"""A plan as tables or as numbers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..resolved import GIB
from .machine import GPU_SHARE, HOST_SHARE, RESERVE_BYTES
from .making import Plan
from .recommendation import arguments, as_yaml, command

KIB = 2**10


def numbers(plan: Plan) -> dict[str, Any]:
    """Everything, for `--json`: bytes, blocks of one worker, tokens, bytes/s."""
    resolved = plan.resolved
    return {
        "model": asdict(plan.model),
        "machine": asdict(plan.machine),
        "context": plan.context,
        "kv_bytes_per_token": plan.kv_token_bytes,
        "index_bytes_per_token": plan.index_token_bytes,
        "block_bytes": plan.block_bytes,
        "kv_cache_bytes": plan.kv_bytes,
        "index_bytes": resolved.index_bytes,
        "host_pool_bytes": resolved.host_pool_bytes,
        "host_pages": resolved.num_pages,
        "host_bytes_all_workers": plan.host_bytes,
        "request": asdict(plan.need),
        "capacity": asdict(plan.capacity),
        "break_even": asdict(plan.break_even),
        "arguments": arguments(plan),
    }


def rows(plan: Plan) -> list[tuple[str, str]]:
    """What there is to say, one worker each unless it says otherwise."""
    resolved, need, capacity = plan.resolved, plan.need, plan.capacity
    even, workers = plan.break_even, plan.machine.tensor_parallel
    rate = "never" if even.hit_rate is None else f"{even.hit_rate:.2f}"
    link = "-" if even.link_bandwidth is None else f"{even.link_bandwidth / 1e9:.1f} GB/s"
    kind = "counted from the architecture" if plan.model.weights_are_counted else "of its files"
    return [
        ("weights", f"{plan.model.weight_bytes / GIB:.2f} GiB, {kind}, over {workers} worker(s)"),
        ("KV of a token", f"{plan.kv_token_bytes / KIB:.1f} KiB"),
        ("index of a token", f"{plan.index_token_bytes / KIB:.2f} KiB"),
        ("KV cache", f"{plan.kv_bytes / GIB:.2f} GiB, {capacity.kv_blocks} blocks of "
         f"{resolved.block_size}"),
        ("blocks of a request, dense", str(need.dense_blocks)),
        ("blocks while it is prefilled", str(need.prefill_blocks)),
        ("blocks of a request, sparse", str(need.sparse_blocks)),
        ("requests at once, dense", str(capacity.dense_requests)),
        ("requests at once, sparse", f"{capacity.sparse_requests}, limited by the "
         f"{capacity.limited_by}"),
        ("swap pool", f"{resolved.host_pool_bytes / GIB:.2f} GiB, {resolved.num_pages} pages"),
        ("host memory, all workers", f"{plan.host_bytes / GIB:.2f} GiB"),
        ("index on the device", f"{resolved.index_bytes / GIB:.3f} GiB"),
        ("break-even hit rate", f"{rate} over a link of "
         f"{plan.machine.link_bandwidth / 1e9:.0f} GB/s"),
        ("break-even bandwidth", f"{link} with every block missing"),
    ]  # fmt: skip


def assumptions(plan: Plan) -> str:
    """What the numbers take for granted."""
    if plan.machine.kv_cache_bytes is not None:
        gpu = "the KV cache is what was given, the index lies beside it"
    else:
        gpu = (
            f"vLLM takes {GPU_SHARE:.0%} of a GPU of {plan.machine.gpu_bytes / GIB:.0f} GiB, "
            f"{RESERVE_BYTES / GIB:.0f} GiB of it for activations and graphs"
        )
    note = (
        f"Assumed: {gpu}; the swap pools take at most {HOST_SHARE:.0%} of the host's free memory "
        f"({plan.machine.host_bytes / GIB:.1f} GiB); every request has {plan.context} tokens, one "
        f"prompt is prefilled at a time, {plan.machine.chunk_tokens} tokens a step."
    )
    least = plan.resolved.config.min_context_tokens
    if plan.context < least:
        note += f" Requests of less than min_context_tokens {least} stay dense."
    elif plan.need.sparse_blocks == plan.need.dense_blocks:
        note += " The budget covers this context: such requests stay dense."
    return note


def show(plan: Plan) -> None:
    """Print table, assumptions and configuration."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{plan.model.name}, requests of {plan.context} tokens", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows(plan):
        table.add_row(name, value)
    console = Console(highlight=False)
    console.print(table)
    console.print(assumptions(plan))
    print(f"\n{as_yaml(plan)}\n{command(plan)}")
