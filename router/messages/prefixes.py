"""The keys of prompts' prefixes: what a router shares pages by, and a gateway chooses routers by.

A key is a chained hash: blake3 of the key of the block before and of the block's token ids. Two
blocks have one key where all tokens up to their ends are the same, and what the root names too: the
model's identity, the tenant, and the request's ``cache_salt``.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence

from blake3 import blake3

BLOCK_TOKENS = 16
"""The tokens of a block by which gateways choose routers."""
MAX_BLOCKS = 256
"""A gateway looks at so many blocks of a prompt; those of routers are not bounded."""


def prefix_root(identity: str, tenant: str, salt: str) -> bytes:
    """Return the key before the first block; no two triples have the same one."""
    return blake3(json.dumps([identity, tenant, salt]).encode()).digest()


def prefix_keys(root: bytes, token_ids: Sequence[int], block_tokens: int) -> list[bytes]:
    """Return the keys of the whole blocks of some tokens, each after the one before.

    ``root`` is the key before these tokens. Ids are 64-bit.
    """
    ids = array("q", token_ids)
    data, size = ids.tobytes(), ids.itemsize * block_tokens
    key, keys = root, []
    for end in range(size, len(data) + 1, size):
        key = blake3(key + data[end - size : end]).digest()
        keys.append(key)
    return keys
