# SPDX-License-Identifier: Apache-2.0
"""One line of what is served and what is not."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """Who says no, and when."""

    SERVED = "served"
    AT_START = "refused at start"  # `setup.refuse`: by the configuration alone
    BY_LAYER = "refused by layer"  # backend, selector or implementation, while the model loads
    BY_CACHE = "refused with the KV cache"  # when groups and caches are known
    BY_REQUEST = "refused by request"  # that request alone, status 400
    DENSE = "served densely"  # by request, counted under a reason


@dataclass(frozen=True)
class Entry:
    """A model type or a feature.

    `fix` is what to do about a refusal, `examples` are models. `tests` names what holds the line
    true, as `tests/file.py::function` or `tests/file.py::function[case]`.
    """

    what: str
    kind: Kind
    why: str
    tests: tuple[str, ...]
    fix: str = ""
    examples: str = ""

    def refusal(self, found: object = None) -> str:
        """The error, in words; `found` is the value that was refused."""
        here = "" if found is None else f" (here {found})"
        return (
            f"--attention-backend sentencekv does not support {self.what}{here}: {self.why}; "
            f"{self.fix}."
        )
