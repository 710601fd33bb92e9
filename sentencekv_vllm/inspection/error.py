# SPDX-License-Identifier: Apache-2.0
"""What cannot be inspected."""

from __future__ import annotations


class InspectError(ValueError):
    """The message holds rule, value and fix."""
