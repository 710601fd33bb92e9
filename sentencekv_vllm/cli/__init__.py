# SPDX-License-Identifier: Apache-2.0
"""The console script `sentencekv`."""

from __future__ import annotations

from .main import COMMANDS, main

__all__ = ["COMMANDS", "main"]
