# SPDX-License-Identifier: Apache-2.0
"""The floor: what a budget is worth without any ranking."""

from __future__ import annotations

from ..types import IndexKind
from .base import SelectionPolicy

RANDOM = SelectionPolicy(name="random", index=IndexKind.RANDOM)
"""Sentences are ranked by a seeded hash of step, KV head and sentence.

Idea: every method must beat it at the same budget. Parameters: none of its own; the seed is
the request's. Query, reduction and retention have no effect.
"""
