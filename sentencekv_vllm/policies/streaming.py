# SPDX-License-Identifier: Apache-2.0
"""Sinks and recent window only."""

from __future__ import annotations

from .base import SelectionPolicy

STREAMING = SelectionPolicy(name="streaming", index=None, selects=False)
"""No history block is ever attended to.

Paper: StreamingLLM (arXiv 2309.17453). Parameters: `num_sink_tokens` and `recent_window`; the
token budget is not used.

Differences from the paper: prefill attention is exact, and positions keep their true distance,
where the paper numbers the kept tokens anew.
"""
