"""The keys of prefixes: chained hashes of whole blocks, under a root that keeps tenants apart."""

from __future__ import annotations

from blake3 import blake3

from router.messages.prefixes import prefix_keys, prefix_root
from router.messages.request import TokenEvent

ROOT = prefix_root("identity", "tenant", "salt")


def test_a_key_is_the_hash_of_the_key_before_and_the_blocks_ids() -> None:
    first = blake3(ROOT + b"".join(i.to_bytes(8, "little") for i in (1, 2**40))).digest()
    second = blake3(first + b"".join(i.to_bytes(8, "little") for i in (3, 4))).digest()
    assert prefix_keys(ROOT, [1, 2**40, 3, 4, 5], 2) == [first, second]


def test_a_part_of_a_block_has_no_key() -> None:
    assert prefix_keys(ROOT, [], 4) == []
    assert prefix_keys(ROOT, (1, 2, 3), 4) == []
    assert len(prefix_keys(ROOT, [1, 2, 3, 4], 4)) == 1


def test_keys_go_on_from_a_key() -> None:
    whole = prefix_keys(ROOT, range(64), 16)
    assert prefix_keys(whole[1], range(32, 64), 16) == whole[2:]


def test_an_early_token_changes_all_later_keys() -> None:
    changed = prefix_keys(ROOT, [*range(16), 99, *range(17, 64)], 16)
    assert [a == b for a, b in zip(prefix_keys(ROOT, range(64), 16), changed, strict=True)] == [
        True,
        False,
        False,
        False,
    ]


def test_identity_tenant_and_salt_each_make_another_root() -> None:
    parts = [("i", "t", "s"), ("i", "t", ""), ("i", "", "t"), ("", "i", "t"), ("it", "", "s")]
    assert len({prefix_root(*each) for each in parts}) == len(parts)


def test_events_without_cached_tokens_keep_their_form() -> None:
    event = TokenEvent(0, (5,), identity="i")
    assert len(event.to_wire()) == 7
    cached = TokenEvent(0, (5,), identity="i", cached_tokens=32)
    assert TokenEvent.from_wire(cached.to_wire()) == cached
    assert TokenEvent.from_wire(event.to_wire()) == event
