"""Which router a prompt goes to: one that had its beginning, unless that is clearly busier."""

from __future__ import annotations

import random

import pytest

from router.gateway.upstream.affinity import MAX_REMEMBERED, SentPrefixes, choose, keys_of_call
from router.messages.prefixes import BLOCK_TOKENS, MAX_BLOCKS, prefix_keys, prefix_root

ROOT = prefix_root("m", "", "")


def call(token_ids: range, tenant: str = "", salt: str = "") -> dict[str, object]:
    ids = tuple(token_ids)
    return {
        "request": {"model": "m", "tenant": tenant, "cache_salt": salt, "prompt_token_ids": ids}
    }


@pytest.mark.parametrize(
    ("loads", "matches", "chosen"),
    [
        ([3], [0], 0),
        ([0, 0, 0], [0, 0, 0], 0),
        ([0, 1, 2], [0, 3, 5], 2),
        ([0, 2, 2], [0, 5, 5], 1),
        ([0, 3], [0, 32], 0),
        ([8, 12], [0, 1], 1),
        ([8, 13], [0, 32], 0),
        ([100, 127, 128], [1, 2, 32], 1),
    ],
)
def test_the_longest_match_is_chosen_among_routers_that_are_not_busy(
    loads: list[int], matches: list[int], chosen: int
) -> None:
    assert choose(loads, matches) == chosen


def test_a_prompt_matches_as_many_blocks_as_it_begins_with_of_an_earlier_one() -> None:
    sent = SentPrefixes()
    keys = prefix_keys(ROOT, range(640), BLOCK_TOKENS)
    assert sent.match(keys) == 0
    sent.add(keys[:25])
    assert sent.match(keys) == 25
    assert sent.match(keys[:7]) == 7
    assert sent.match(prefix_keys(ROOT, [*range(40), *range(50)], BLOCK_TOKENS)) == 2
    assert sent.match([]) == 0


def test_old_prompts_are_forgotten_from_their_ends() -> None:
    sent = SentPrefixes()
    source = random.Random(1)
    old = prefix_keys(ROOT, range(160), BLOCK_TOKENS)
    sent.add(old)
    others = [source.randbytes(32) for _ in range(MAX_REMEMBERED - 4)]
    sent.add(others)
    assert sent.match(old) == 4
    assert sent.match(others) == len(others)
    sent.add([source.randbytes(32) for _ in range(MAX_REMEMBERED)])
    assert sent.match(old) == 0


def test_more_blocks_than_are_remembered_leave_the_first() -> None:
    sent = SentPrefixes()
    keys = [i.to_bytes(32, "little") for i in range(2 * MAX_REMEMBERED)]
    sent.add(keys)
    assert sent.match(keys) == MAX_REMEMBERED


def test_the_keys_of_a_call_are_those_of_its_blocks_but_for_what_is_computed_anyway() -> None:
    tokens = range(2 * BLOCK_TOKENS)
    assert len(keys_of_call(call(tokens))) == 1
    assert len(keys_of_call(call(range(2 * BLOCK_TOKENS + 1)))) == 2
    assert len(keys_of_call(call(range(100_000)))) == MAX_BLOCKS
    roots = {keys_of_call(call(tokens, *each))[0] for each in (("", ""), ("t", ""), ("", "t"))}
    assert len(roots) == 3
