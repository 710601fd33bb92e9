# SPDX-License-Identifier: Apache-2.0
"""Rows of the GPU benchmark, printed and as CSV."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from gpu_clock import Timing


@dataclass(frozen=True)
class Row:
    """One measured call."""

    section: str
    model: str
    context: int  # tokens
    requests: int
    case: str
    implementation: str
    p20_us: float
    p50_us: float
    p80_us: float
    floor_us: float  # its bytes at the bandwidth of a plain copy

    @staticmethod
    def of(where: tuple[str, str, int, int], case: str, implementation: str,
           timing: Timing, floor_seconds: float) -> Row:  # fmt: skip
        return Row(*where, case, implementation, timing.p20, timing.p50, timing.p80,
                   1e6 * floor_seconds)  # fmt: skip

    def show(self) -> None:
        place = f"{self.model} {self.context // 1024}K x {self.requests}" if self.model else ""
        print(
            f"{self.section:9} {place:25} {self.case:20} {self.implementation:20} "
            f"{self.p50_us:10.1f} us  floor {self.floor_us:9.1f} us "
            f"{self.floor_us / self.p50_us:5.0%}",
            flush=True,
        )


def provenance() -> dict[str, str]:
    """What produced the rows."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return {
        "commit": described.stdout.strip() or "unknown",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    source = provenance()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*Row.__dataclass_fields__, *source])
        writer.writeheader()
        writer.writerows({**asdict(row), **source} for row in rows)
