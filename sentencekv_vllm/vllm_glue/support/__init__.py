# SPDX-License-Identifier: Apache-2.0
"""What is served, what is refused and why: the one list behind the refusals and the table in
docs/compatibility.md. Nothing here imports vLLM."""

from __future__ import annotations

from .entry import Entry, Kind
from .hybrids import HYBRIDS
from .refused_by_model import BY_MODEL
from .refused_by_option import BY_OPTION
from .served import SERVED

__all__ = ["ENTRIES", "HYBRIDS", "REFUSED", "Entry", "Kind"]

REFUSED: dict[str, Entry] = {**BY_OPTION, **BY_MODEL}
"""By the key under which `setup` and the tests know them."""

ENTRIES: tuple[Entry, ...] = (*SERVED, *HYBRIDS.values(), *REFUSED.values())
