# SPDX-License-Identifier: Apache-2.0
"""What cannot be planned."""

from __future__ import annotations


class PlanError(ValueError):
    """The message holds rule, value and fix."""
