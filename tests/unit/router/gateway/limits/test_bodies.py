"""Bodies of requests: the time that they may take to come, and one key's share of the bytes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message

from cluster.errors import OverloadedError
from router.gateway.limits.room import Bodies
from tests.unit.gateway_fakes import FakeUpstream, http_app, says
from tests.unit.virtual_time import run

LIMIT = 100


def test_one_key_leaves_as_many_bytes_free_as_it_takes() -> None:
    bodies = Bodies(LIMIT)
    alice, more, bob, last = (bodies.share_of(name) for name in ("alice", "alice", "bob", "bob"))
    alice.take(40)
    more.take(10)
    with pytest.raises(OverloadedError, match="this key's request bodies take as many"):
        more.take(1)
    bob.take(25)
    with pytest.raises(OverloadedError, match="this key"):
        last.take(1)
    more.give_back()
    more.give_back()  # a second one does nothing
    last.take(5)
    assert bodies.taken == 70
    for share in (alice, bob, last):
        share.give_back()
    assert (bodies.taken, bodies.by_name) == (0, {})
    nobody = bodies.share_of("")  # without keys they may take all
    nobody.take(LIMIT)
    with pytest.raises(OverloadedError, match="at most 100 bytes of request bodies at one time"):
        nobody.take(1)


@pytest.mark.parametrize("has_length", [True, False])
@pytest.mark.parametrize(("piece_s", "status"), [(1.0, 200), (4.0, 408)])
@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_a_body_has_a_time_to_come(
    path: str, piece_s: float, status: int, has_length: bool
) -> None:
    """In nine pieces; without a length, the longest body's time counts: 74 s of 4 MiB."""
    upstream = FakeUpstream(says(" was"))
    body = json.dumps({"model": "tiny", "prompt": "in"}).encode()
    pieces = [body[:-8], *(body[-8 + i : len(body) - 7 + i] for i in range(8))]
    late_s = piece_s if has_length else 8 * piece_s
    answer: list[Message] = []

    async def receive() -> Message:
        await asyncio.sleep(late_s if pieces else 1e6)
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: Message) -> None:
        answer.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": path, "query_string": b""}
    scope["headers"] = headers if has_length else headers[:1]
    run(http_app(upstream)(scope, receive, send))
    assert answer[0]["status"] == status
    if status == 408:
        assert upstream.requests == []
        assert b"the body did not arrive within" in answer[1]["body"]
