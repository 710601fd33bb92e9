# SPDX-License-Identifier: Apache-2.0
"""Ownership of the host pages: one list of free ids, counted on the scheduler side."""

from __future__ import annotations


class PagePool:
    """Host pages [0, num_pages), each with its index rows."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` pages, or None and no change where there are fewer."""
        if count > len(self._free):
            return None
        if count == 0:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        return taken

    def give(self, pages: list[int]) -> None:
        """Take pages back; the last given is the first taken again."""
        self._free.extend(pages)
        assert len(self._free) <= self.num_pages, "a page was given back twice"
