# SPDX-License-Identifier: Apache-2.0
"""The headline table of docs/results.md: `sentencekv eval` with its settings.

    python -P benchmarks/accuracy.py --items 100

Options are those of `sentencekv eval` and come after the ones given here.
"""

from __future__ import annotations

import sys

from sentencekv_vllm.evaluation.command import main

HEADLINE = {
    "--tasks": "niah_single,niah_multiquery,variable_tracking",
    "--contexts": "4096,8192",
    "--policies": "dense,sentencekv,sentencekv-paper,streaming,random",
    "--budgets": "256",
    "--out": "results/accuracy",
}

if __name__ == "__main__":
    given = [word for option in HEADLINE.items() for word in option]
    sys.exit(main([*given, *sys.argv[1:]]))
