# SPDX-License-Identifier: Apache-2.0
"""`sentencekv plan`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ..plan.machine import CHUNK_TOKENS, DEVICE_BANDWIDTH, LINK_BANDWIDTH
from .complaint import FAILED, MISUSED, complain

GB = 1e9


def plan(
    model: Annotated[
        str, typer.Argument(help="A folder with config.json, that file, or a name on the hub.")
    ],
    gpu_memory_gib: Annotated[float, typer.Option(min=0.1, help="Of one GPU.")] = 80.0,
    host_memory_gib: Annotated[
        float | None, typer.Option(min=0.01, help="Free on the host; default: what is free here.")
    ] = None,
    kv_cache_gib: Annotated[
        float | None, typer.Option(min=0.01, help="Of one worker, in place of the GPU's memory.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a request; default: the model's, or 32768.")
    ] = None,
    budget: Annotated[int | None, typer.Option(min=1, help="token_budget; default: 512.")] = None,
    policy: Annotated[str | None, typer.Option(help="default: sentencekv")] = None,
    host_kv_dtype: Annotated[
        str | None, typer.Option(help="Precision of the swap pool: auto, int8, fp8, int4.")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Workers of the host.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of weights and KV: auto, bfloat16, ...")] = "auto",
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a KV block.")] = 32,
    chunk: Annotated[
        int, typer.Option(min=1, help="Tokens of a prefill step: --max-num-batched-tokens.")
    ] = CHUNK_TOKENS,
    device_bandwidth: Annotated[
        float, typer.Option(min=1, help="GB/s of the GPU's memory; default: an H200's.")
    ] = DEVICE_BANDWIDTH / GB,
    link_bandwidth: Annotated[
        float, typer.Option(min=0.1, help="GB/s from host to GPU; default: measured on an H200.")
    ] = LINK_BANDWIDTH / GB,
    as_json: Annotated[
        bool, typer.Option("--json", help="All numbers as one JSON object.")
    ] = False,
    as_yaml: Annotated[
        bool, typer.Option("--yaml", help="The file for vllm serve --config alone.")
    ] = False,
) -> int:
    """Size a server: blocks, requests at once, swap pool, index, break-even, configuration.

    Nothing is started and no weights are read. Sizes of blocks, pages and index are those that a
    server settles; what else is assumed is printed.
    """
    from ..config import ConfigError, SentenceKVConfig
    from ..plan import recommendation, report
    from ..plan.error import PlanError
    from ..plan.machine import GIB, Machine
    from ..plan.making import make_plan
    from ..plan.model_shape import read_model
    from ..worker.host_memory import available_bytes

    chosen: dict[str, Any] = {
        "token_budget": budget,
        "policy": policy,
        "host_kv_dtype": host_kv_dtype,
    }
    try:
        if as_json and as_yaml:
            raise PlanError("--json and --yaml exclude each other: leave one out")
        config = SentenceKVConfig.from_dict({k: v for k, v in chosen.items() if v is not None})
        shape = read_model(model, dtype)
        host = available_bytes() if host_memory_gib is None else int(host_memory_gib * GIB)
        if host is None:
            raise PlanError("this system does not tell its free memory: give --host-memory-gib")
        machine = Machine(
            gpu_bytes=int(gpu_memory_gib * GIB),
            host_bytes=host,
            tensor_parallel=tensor_parallel,
            kv_cache_bytes=None if kv_cache_gib is None else int(kv_cache_gib * GIB),
            device_bandwidth=GB * device_bandwidth,
            link_bandwidth=GB * link_bandwidth,
            chunk_tokens=chunk,
        )
        length = min(shape.max_context, 32768) if context is None else context
        made = make_plan(shape, machine, length, config, block_size)
    except (ConfigError, PlanError) as error:
        complain("sentencekv plan", str(error))
        return MISUSED
    if not (made.capacity.sparse_requests or made.capacity.dense_requests):
        complain(
            "sentencekv plan",
            f"one request of {length} tokens needs {made.need.prefill_blocks} KV blocks and "
            f"{made.need.host_pages} host pages, there is room for {made.capacity.kv_blocks} and "
            f"{made.resolved.num_pages}: raise --gpu-memory-gib, --host-memory-gib or "
            "--tensor-parallel, or lower --context or --chunk",
        )
        return FAILED
    if as_json:
        print(json.dumps(report.numbers(made), indent=2))
    elif as_yaml:
        print(recommendation.as_yaml(made), end="")
    else:
        report.show(made)
    return 0
