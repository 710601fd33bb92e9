# SPDX-License-Identifier: Apache-2.0
"""The oracle: nothing is left out."""

from __future__ import annotations

from .base import SelectionPolicy

FULL = SelectionPolicy(name="full", index=None, selects=False, keeps_all=True)
"""Every history block is attended to, so the output is that of dense attention.

Idea: the ceiling that every policy is measured against. Parameters: none; the token budget is
not used. A request stays dense unless `stay_dense_when_covered` is off; then its history runs
through the working set, which must hold it.
"""
