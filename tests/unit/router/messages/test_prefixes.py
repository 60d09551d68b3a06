"""The keys of prefixes: chained hashes of whole blocks, under a root that keeps tenants apart."""

from __future__ import annotations

from blake3 import blake3

from router.messages.prefixes import prefix_keys, prefix_root

ROOT = prefix_root("identity", "tenant", "salt")


def test_a_key_is_the_hash_of_the_key_before_and_the_ids_of_a_whole_block() -> None:
    first = blake3(ROOT + b"".join(i.to_bytes(8, "little") for i in (1, 2**40))).digest()
    second = blake3(first + b"".join(i.to_bytes(8, "little") for i in (3, 4))).digest()
    assert prefix_keys(ROOT, [1, 2**40, 3, 4, 5], 2) == [first, second]
    assert prefix_keys(first, range(3, 5), 2) == [second]
    assert prefix_keys(ROOT, (1, 2, 3), 4) == prefix_keys(ROOT, [], 4) == []


def test_identity_tenant_and_salt_each_make_another_root() -> None:
    parts = [("i", "t", "s"), ("i", "t", ""), ("i", "", "t"), ("", "i", "t"), ("it", "", "s")]
    assert len({prefix_root(*each) for each in parts}) == len(parts)
