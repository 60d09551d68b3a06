"""Shared pages: who has them, which are found, and which are taken when room is needed."""

from __future__ import annotations

import random

import pytest

from router.model.page_pool import PrefixCache

PAGE_SIZE = 16


def entered(cache: PrefixCache, *keys: bytes) -> list[int]:
    pages = cache.take(len(keys))
    for page, key in zip(pages, keys, strict=True):
        cache.enter(page, key)
    return pages


def test_a_page_is_found_by_its_key_while_it_is_used_and_afterwards() -> None:
    cache = PrefixCache(4, PAGE_SIZE)
    pages = entered(cache, b"a", b"b")
    assert cache.share([b"a", b"b"]) == pages
    assert (cache.num_free, cache.num_idle) == (2, 0)
    cache.give_back(pages)
    assert (cache.num_free, cache.num_idle) == (2, 0)
    cache.give_back(pages)
    assert (cache.num_free, cache.num_idle) == (4, 2)
    assert cache.share([b"a"]) == pages[:1]
    assert (cache.num_free, cache.num_idle) == (3, 1)


def test_only_leading_keys_are_found() -> None:
    cache = PrefixCache(4, PAGE_SIZE)
    pages = entered(cache, b"a", b"c")
    assert cache.share([b"x", b"a"]) == []
    assert cache.share([b"a", b"b", b"c"]) == pages[:1]
    assert cache.share([]) == []


def test_pages_that_were_not_entered_are_free_at_once() -> None:
    cache = PrefixCache(2, PAGE_SIZE)
    cache.give_back(cache.take(2))
    assert (cache.num_free, cache.num_idle) == (2, 0)


def test_idle_pages_are_taken_last_and_the_least_recently_used_first() -> None:
    cache = PrefixCache(5, PAGE_SIZE)
    first, second = entered(cache, b"a", b"ab"), entered(cache, b"x")
    cache.give_back(first)
    cache.give_back(second)
    cache.give_back(cache.share([b"a"]))  # used again
    assert cache.take(2) == [3, 4]
    assert cache.share([b"a", b"ab"]) == first
    cache.give_back(first)
    [taken] = cache.take(1)  # x is older than a and ab by now
    assert [taken] == second
    [taken] = cache.take(1)
    assert taken == first[1]  # the end of a row before its beginning
    assert cache.share([b"a", b"ab"]) == first[:1]


def test_more_pages_than_are_free_are_refused_and_nothing_is_forgotten() -> None:
    cache = PrefixCache(3, PAGE_SIZE)
    used, idle = cache.take(1), entered(cache, b"a")
    cache.give_back(idle)
    with pytest.raises(IndexError, match="3 pages asked for, 2 free"):
        cache.take(3)
    assert cache.share([b"a"]) == idle
    cache.give_back([*used])
    assert cache.num_free == 2


def test_a_second_page_of_the_same_tokens_is_its_users_own() -> None:
    cache = PrefixCache(3, PAGE_SIZE)
    [first], [second] = entered(cache, b"a"), entered(cache, b"a")
    cache.give_back([second])
    assert (cache.num_free, cache.num_idle) == (2, 0)
    assert cache.share([b"a"]) == [first]


def test_forgotten_pages_are_found_no_more_and_free_once_given_back() -> None:
    cache = PrefixCache(2, PAGE_SIZE)
    pages = entered(cache, b"a", b"b")
    cache.forget(pages[1:])
    assert cache.share([b"a", b"b"]) == pages[:1]
    cache.give_back(pages[:1])
    cache.give_back(pages)
    assert (cache.num_free, cache.num_idle) == (2, 1)


def test_no_page_has_two_contents_in_a_long_random_run() -> None:
    source = random.Random(7)
    cache = PrefixCache(12, PAGE_SIZE)
    users: list[list[int]] = []
    content: dict[int, bytes] = {}
    for number in range(3000):
        rows = [bytes([source.randrange(3)]) * (1 + depth) for depth in range(source.randrange(5))]
        if source.random() < 0.5 and cache.num_free >= 6:
            shared = cache.share(rows)
            assert [content[page] for page in shared] == rows[: len(shared)]
            own = cache.take(len(rows) - len(shared) + 1)
            assert not {page for user in users for page in user} & set(own)
            for page, key in zip(own, rows[len(shared) :], strict=False):
                content[page] = key
                cache.enter(page, key)
            content[own[-1]] = b"own %d" % number
            users.append([*shared, *own])
        elif users:
            cache.give_back(users.pop(source.randrange(len(users))))
        used = {page for user in users for page in user}
        assert len(used) == cache.num_pages - cache.num_free
