"""Pages of the key/value cache; several sequences share those found by the keys of their tokens.

A page whose slots are all computed may be entered under a key (:mod:`router.messages.prefixes`).
It is never written again. When its last user gives it back, it stays and is idle: it counts as
free, and is taken, the least recently used first, once no other page is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


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


class PrefixCache:
    """A :class:`PagePool` whose entered pages have any number of users.

    One thread uses it; the numbers may be read on any thread.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        """Start with all pages free and none entered."""
        self._pool = PagePool(num_pages, page_size)
        self.num_pages = num_pages
        self.page_size = page_size
        self._num_users = [0] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: dict[int, None] = {}
        """Entered pages without users, the least recently used first."""

    @property
    def num_free(self) -> int:
        """The number of pages that can be taken, idle ones with them."""
        return self._pool.num_free + len(self._idle)

    @property
    def num_idle(self) -> int:
        """The number of pages that are kept only to be found."""
        return len(self._idle)

    def take(self, count: int) -> list[int]:
        """Take ``count`` pages for one user; raises ``IndexError`` when fewer are free.

        Idle pages are forgotten for them where need be.
        """
        if count > self.num_free:
            raise IndexError(f"{count} pages asked for, {self.num_free} free")
        for _ in range(count - self._pool.num_free):
            page = next(iter(self._idle))
            del self._idle[page]
            del self._page_of[self._key_of.pop(page)]
            self._pool.give_back([page])
        pages = self._pool.take(count)
        for page in pages:
            self._num_users[page] = 1
        return pages

    def share(self, keys: Iterable[bytes]) -> list[int]:
        """Return the pages of the longest row of leading keys that are known, for one more user."""
        pages: list[int] = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            self._idle.pop(page, None)
            self._num_users[page] += 1
            pages.append(page)
        return pages

    def enter(self, page: int, key: bytes) -> None:
        """Let a page be found by the key of its tokens; it has a user, and is not written again.

        Does nothing where another page is known by the key.
        """
        if page not in self._key_of and self._page_of.setdefault(key, page) == page:
            self._key_of[page] = key

    def forget(self, pages: Iterable[int]) -> None:
        """Let pages be found no more; their users keep them."""
        for page in pages:
            key = self._key_of.pop(page, None)
            if key is not None:
                del self._page_of[key]

    def forget_all(self) -> None:
        """Let no page be found any more; those with users stay theirs."""
        self._pool.give_back(list(self._idle))
        for known in (self._idle, self._key_of, self._page_of):
            known.clear()

    def give_back(self, pages: Sequence[int]) -> None:
        """Return a user's pages.

        Of pages in the order of their tokens the last is idle for longest, so that no page is
        taken before those that can be found only by it.
        """
        unknown = []
        for page in reversed(pages):
            self._num_users[page] -= 1
            if self._num_users[page]:
                continue
            if page in self._key_of:
                self._idle[page] = None
            else:
                unknown.append(page)
        self._pool.give_back(unknown[::-1])
