# SPDX-License-Identifier: Apache-2.0
"""Times the GPU kernels: builds them, checks them, then compares.

    python benchmarks/gpu.py

Sections: `kernels` (each kernel against the time its bytes take at the bandwidth measured in
the same run), `gather` (missed head-blocks out of pinned memory against one plain copy of as
many bytes), `attention` (dense decode by others against ours, over the whole context and over
the token budget) and `step` (all of a layer's decode at several hit rates). A kernel that
disagrees with its definition stops the run before anything is timed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from gpu_clock import GIB, Clock, measure_bandwidth
from gpu_layer import SHAPES, Shape
from gpu_report import provenance, write_csv

SECTIONS = ("kernels", "gather", "attention", "step")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    def integers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
        def split(text: str) -> list[str]:
            parts = text.split(",")
            for part in parts:
                if part not in known:
                    raise argparse.ArgumentTypeError(f"{part!r} is none of {', '.join(known)}")
            return parts

        return split

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sections", type=names(SECTIONS), default=list(SECTIONS))
    add("--models", type=names(tuple(SHAPES)), default=list(SHAPES))
    add("--contexts", type=integers, default=[8192, 32768, 131072], help="tokens")
    add("--requests", type=integers, default=[1, 8, 64], help="batch sizes")
    add("--budget", type=int, default=1024, help="tokens attended to, sinks and recent included")
    add("--repeats", type=int, default=30)
    add("--host-gib", type=float, default=16, help="pinned memory that a case may take")
    add("--csv", type=Path, default=Path("results/gpu.csv"))
    options = parser.parse_args(arguments)
    if options.budget < 256:
        parser.error(
            f"--budget {options.budget}: sinks and recent window take 160 tokens; give 256 or more"
        )
    return options


def cases(options: argparse.Namespace) -> Iterator[tuple[Shape, int, int]]:
    """(shape, context, requests) in order of size."""
    sizes = sorted(
        itertools.product(options.contexts, options.requests), key=lambda size: size[0] * size[1]
    )
    for name in options.models:
        for context, requests in sizes:
            yield SHAPES[name], context, requests


def main() -> int:
    options = parse()
    if not torch.cuda.is_available():
        print(
            "benchmarks/gpu.py needs a CUDA device and a torch built for CUDA, and found none: "
            "no other machine says anything about their speed",
            file=sys.stderr,
        )
        return 2
    # Not earlier: without a GPU these may fail in ways that say less than the line above.
    import gpu_checks
    import gpu_sections

    print(", ".join(f"{name} {value}" for name, value in provenance().items()))
    if failures := gpu_checks.failures():
        print("nothing is timed, because", *failures, sep="\n  ", file=sys.stderr)
        return 1
    clock = Clock(options.repeats)
    bandwidth = measure_bandwidth(clock)
    print(bandwidth)
    bench = gpu_sections.Bench(
        clock, bandwidth, options.budget, options.host_gib * GIB, torch.cuda.mem_get_info()[0]
    )
    sizes = list(cases(options))
    rows = []
    for section in options.sections:
        for row in getattr(bench, section)(sizes):
            row.show()
            rows.append(row)
    write_csv(options.csv, rows)
    print(f"{len(rows)} rows in {options.csv}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
