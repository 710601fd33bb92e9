# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/results.md: `sentencekv eval` with its options filled in.

    python -P benchmarks/accuracy.py --preset headline
    python -P benchmarks/accuracy.py --preset sweep

Policies are all that there are. Options of `sentencekv eval` may follow and replace the preset's;
each run leaves `results/PRESET/summary.md`, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import sys

from sentencekv_vllm.evaluation.command import main

SMALL = "niah_single,niah_multikey,niah_multiquery,variable_tracking"
PRESETS: dict[str, dict[str, str]] = {
    # 128 tokens of history, 64 of sinks and recent window, of 8192.
    "headline": {
        "--tasks": SMALL,
        "--contexts": "8192",
        "--policies": "all",
        "--budgets": "192",
        "--items": "200",
    },
    "sweep": {
        "--tasks": SMALL,
        "--styles": "restated",
        "--contexts": "2048,4096,8192,16384",
        "--policies": "all",
        "--budgets": "128,192,320,576,1088",  # history of 64 to 1024 tokens
        "--items": "25",
        "--working-set": "1280",
        "--host-pool-gib": "2",
    },
    "multi-turn": {
        "--tasks": "multi_turn,multi_turn_session",
        "--contexts": "8192",
        "--policies": "all",
        "--budgets": "192",
        "--items": "50",
    },
    "ranking": {
        "--tasks": "niah_multiquery,variable_tracking,multi_turn_session",
        "--styles": "restated",
        "--contexts": "4096",
        "--policies": "all",
        "--ablation": "",
        "--kl": "",
        "--budgets": "192,320",
        "--items": "40",
    },
}


def arguments(given: list[str]) -> list[str]:
    """Those of `sentencekv eval`; later ones win."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="headline")
    chosen, rest = parser.parse_known_args(given)
    preset = {"--out": f"results/{chosen.preset}", "--processes": "2"} | PRESETS[chosen.preset]
    return [word for option in preset.items() for word in option if word] + rest


if __name__ == "__main__":
    sys.exit(main(arguments(sys.argv[1:])))
