# SPDX-License-Identifier: Apache-2.0
"""Command lines of `sentencekv eval` by name: the tables of docs/results.md."""

from __future__ import annotations

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
        "--items": "15",
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
    "long-text": {
        "--tasks": "long_answers,long_filler",
        "--contexts": "8192",
        "--policies": "all",
        "--budgets": "192,320",
        "--items": "12",
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


def arguments(name: str) -> list[str]:
    """Of a preset."""
    preset = {"--out": f"results/{name}", "--processes": "2"} | PRESETS[name]
    return [word for option in preset.items() for word in option if word]
