# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/results.md: `sentencekv eval` with the options of a preset.

    python -P benchmarks/accuracy.py --preset headline
    python -P benchmarks/accuracy.py --preset sweep

Policies are all that there are. Options of `sentencekv eval` may follow and replace the preset's;
each run leaves `results/PRESET/summary.md`, and a run that was stopped goes on.
"""

from __future__ import annotations

import sys

from sentencekv_vllm.evaluation.command import main

if __name__ == "__main__":
    sys.exit(main(["--preset", "headline", *sys.argv[1:]]))
