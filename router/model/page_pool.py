"""Pages of the key/value cache."""

from __future__ import annotations

from collections.abc import Sequence


class PagePool:
    """Hands out pages of ``page_size`` token slots; a sequence's pages need not be adjacent."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        """Start with all pages free."""
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """The number of free pages."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Take ``count`` pages; raises ``IndexError`` when fewer are free."""
        if count > len(self._free):
            raise IndexError(f"{count} pages asked for, {len(self._free)} free")
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return taken[::-1]

    def give_back(self, pages: Sequence[int]) -> None:
        """Return pages to the pool."""
        self._free.extend(reversed(pages))


def pages_needed(num_tokens: int, page_size: int) -> int:
    """Return the number of pages for ``num_tokens`` tokens."""
    return -(-num_tokens // page_size)
