"""Which router a request goes to, so that it finds the beginning of its prompt in the cache there.

A gateway remembers what it sent to each router lately, by the keys of the prompts' blocks
(:mod:`router.messages.prefixes`). What other gateways sent it does not know, nor what a router has
forgotten since: a wrong guess costs a prompt its prefill, and no more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from router.messages.prefixes import BLOCK_TOKENS, MAX_BLOCKS, prefix_keys, prefix_root

MAX_REMEMBERED = 4096
"""The blocks that a gateway remembers of one router: some hundred bytes each."""
SPARE_CALLS, SPARE_SHARE = 2, 0.25
"""A router may owe so many answers, and this share of them, more than the one that owes the fewest,
and be chosen for what it has."""


def choose(loads: Sequence[int], matches: Sequence[int]) -> int:
    """Return the place of the router with the longest match that is not clearly busier than others.

    ``loads`` are the answers that each owes, ``matches`` the blocks of the prompt that it had. Of
    equal matches the first is chosen.
    """
    most = min(loads) * (1 + SPARE_SHARE) + SPARE_CALLS
    allowed = [place for place, load in enumerate(loads) if load <= most]
    return max(allowed, key=lambda place: matches[place])


class SentPrefixes:
    """The blocks of the prompts that one router got lately; the least recent ones are forgotten."""

    def __init__(self) -> None:
        """Start with none."""
        self._keys: dict[bytes, None] = {}

    def match(self, keys: Sequence[bytes]) -> int:
        """Return how many leading blocks of a prompt the router had."""
        # A block is at least as recent as each that follows it, so those known come first.
        return bisect_left(keys, True, key=lambda key: key not in self._keys)

    def add(self, keys: Sequence[bytes]) -> None:
        """Remember the blocks of a prompt that is sent to the router."""
        known = self._keys
        for key in reversed(keys):
            known.pop(key, None)
            known[key] = None
        while len(known) > MAX_REMEMBERED:
            del known[next(iter(known))]


def keys_of_call(wire: Mapping[str, Any]) -> list[bytes]:
    """Return the keys of the prompt of a router's call, as ``RouterReplica.generate`` takes it."""
    request = wire["request"]
    root = prefix_root(request["model"], request["tenant"], request["cache_salt"])
    # What ends the prompt is computed in any case.
    token_ids = request["prompt_token_ids"][:-1][: MAX_BLOCKS * BLOCK_TOKENS]
    return prefix_keys(root, token_ids, BLOCK_TOKENS)


def no_keys(wire: Mapping[str, Any]) -> list[bytes]:
    """Return no keys: the router shares nothing."""
    return []
