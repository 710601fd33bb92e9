# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels as `torch.ops.sentencekv.*`.

The schemas declare what is written, so that torch.compile keeps the calls in order and CUDA
graphs may hold them. Arguments: see `ops.cuda.Launcher`. Import this file to register them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from .cuda import Launcher, library

RANKED = (
    "Tensor tops, Tensor sums, Tensor pages, Tensor(q!)? page_kept, Tensor(a!) best, "
    "Tensor row_pages, Tensor(b!)? kept, Tensor sentence_ends, Tensor num_sentences, Tensor first, "
    "Tensor reduce, Tensor seeds, Tensor step, Tensor(c!) scores, Tensor(d!) mass, "
    "Tensor num_pages, Tensor history_lo, Tensor history_hi, Tensor budget_blocks, "
    "Tensor index_kind, Tensor retention, Tensor(e!) blocks, Tensor(f!) coverage, "
    "int block_size, int rows_per_page, int group"
)
SCHEMAS = {
    "quantize_query": (
        "(Tensor query, Tensor query_map, Tensor index_kind, Tensor(a!) levels, Tensor(b!) steps, "
        "Tensor(c!) mean_levels, Tensor(d!) mean_steps, int bits) -> ()"
    ),
    "score_blocks": (
        "(Tensor codes, Tensor scales, Tensor means, Tensor mean_scales, Tensor levels, "
        "Tensor steps, Tensor mean_levels, Tensor mean_steps, Tensor pages, Tensor num_pages, "
        "Tensor index_kind, Tensor(a!) tops, Tensor(b!) sums, float unit) -> ()"
    ),
    "rank": f"({RANKED}) -> ()",
    "decode_selection": (
        f"({RANKED}, Tensor private_blocks, "
        "Tensor(g!) page_slot, Tensor(h!) slot_page, Tensor(i!) slot_stamp, "
        "Tensor(j!) head_tables, Tensor(k!) misses, Tensor(l!) miss_counts, "
        "Tensor(m!) hit_totals, Tensor(n!) miss_totals, Tensor(o!) coverage_totals, Tensor host, "
        "Tensor(p!) cache) -> ()"
    ),
    "resolve_residency": (
        "(Tensor blocks, Tensor coverage, Tensor pages, Tensor private_blocks, "
        "Tensor budget_blocks, Tensor history_lo, Tensor step, Tensor(a!) page_slot, "
        "Tensor(b!) slot_page, Tensor(c!) slot_stamp, Tensor(d!) head_tables, "
        "Tensor(e!) misses, Tensor(f!) miss_counts, Tensor(g!) hit_totals, "
        "Tensor(h!) miss_totals, Tensor(i!) coverage_totals) -> ()"
    ),
    "gather_misses": "(Tensor host, Tensor(a!) cache, Tensor misses, Tensor miss_counts) -> ()",
    "copy_pages": "(Tensor source, Tensor(a!) target, Tensor pairs) -> ()",
    "copy_page_runs": "(Tensor source, Tensor(a!) target, Tensor pairs) -> ()",
}


@cache
def launcher() -> Launcher:
    """The kernels built with nvcc.

    Raises:
        RuntimeError: they could not be built; the log says why. Ask `cuda.library()` first.
    """
    built = library()
    if built is None:
        raise RuntimeError(
            "the CUDA kernels could not be built (see the log): install nvcc and set CUDA_HOME, "
            "or use the Triton kernels"
        )
    return Launcher(built)


def _launch(name: str) -> Callable[..., None]:
    return lambda *args: getattr(launcher(), name)(*args)


def _fake(*_: object) -> None:
    """The ops return nothing, so that their fake versions do nothing."""


_ops: Any = torch.library.Library("sentencekv", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    _ops.define(_name + _schema)
    _ops.impl(_name, _launch(_name), "CUDA")
    torch.library.register_fake(f"sentencekv::{_name}", _fake, lib=_ops)
