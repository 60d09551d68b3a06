"""Clients that stop reading their streams: what others feel of it, and what is held for them."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

from benchmarks.common import MODEL, summary_ms
from benchmarks.held import memory_mb, metrics
from benchmarks.open_loop import TIMEOUT_S, Answer, asker, body_of, prompt_of

if TYPE_CHECKING:
    from benchmarks.serve_clients import Ports

OTHERS, OTHERS_TOKENS = 8, 32
ROUNDS, STRETCH_S, SETTLE_S = 3, 15.0, 2.0
LOGPROBS = 20
GRPC_TOKENS, HTTP_TOKENS = 400, 160
"""Over 100 KB an answer: far more than its client takes, about what lies between takes."""
SMALL_BYTES = 4096
"""What a stalled client's window or socket takes."""
DONE_S = 120.0
POLL_S = 0.25
AT_ONCE = 20


@contextmanager
def stalled(ports: Ports, count: int) -> Iterator[None]:
    """Have so many clients read one token each and then nothing, half of them over HTTP."""
    with ExitStack() as stack, ThreadPoolExecutor(AT_ONCE) as pool:
        begun = pool.map(
            lambda number: (_http if number % 2 else _grpc)(ports, number), range(count)
        )
        for leave in begun:
            stack.callback(leave)
        yield


def _http(ports: Ports, number: int) -> Callable[[], None]:
    """Read the first event of an answer over HTTP; returns how to leave."""
    asked = body_of(prompt_of(number), HTTP_TOKENS, True, logprobs=LOGPROBS, timeout_s=TIMEOUT_S)
    body = json.dumps(asked).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BYTES)
    client.settimeout(TIMEOUT_S)
    client.connect(("127.0.0.1", ports.http))
    client.sendall(head.encode() + body)
    came = b""
    while b"data: {" not in came:
        piece = client.recv(512)
        if not piece or not (came + piece).startswith(b"HTTP/1.1 200"[: len(came + piece)]):
            raise RuntimeError(f"a reader was refused: {(came + piece)[:200]!r}")
        came += piece
    return client.close


def _grpc(ports: Ports, number: int) -> Callable[[], None]:
    """Read the first message of an answer over gRPC; returns how to leave."""
    import grpc

    from router.protos import inference_pb2, inference_pb2_grpc

    window = [
        ("grpc.http2.lookahead_bytes", SMALL_BYTES),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.use_local_subchannel_pool", 1),  # a connection of its own
    ]
    channel = grpc.insecure_channel(ports.grpc_address, options=window)
    request = inference_pb2.GenerateRequest(
        model=MODEL,
        prompt_token_ids=inference_pb2.TokenIds(ids=prompt_of(number)),
        sampling=inference_pb2.Sampling(
            max_tokens=GRPC_TOKENS, temperature=0.0, ignore_eos=True, logprobs=LOGPROBS
        ),
        timeout_s=TIMEOUT_S,
    )
    next(inference_pb2_grpc.InferenceStub(channel).GenerateStream(request, timeout=TIMEOUT_S))
    return channel.close


async def others(ports: Ports, seconds: float) -> list[Answer]:
    """Return the streams that a few clients get in so many seconds, each after its last.

    Raises ``RuntimeError`` when one is not answered. What begins in the first moments is left out.
    """
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    answers: list[Answer] = []

    async with asker(ports, OTHERS_TOKENS) as asks:

        async def client(number: int) -> None:
            while (now_s := loop.time() - start_s) < seconds:
                answer = await asks.ask(number, now_s, start_s, stream=True)
                if not answer.is_answered:
                    raise RuntimeError(f"beside stalled readers: {answer.kind}")
                if now_s >= SETTLE_S:
                    answers.append(answer)
                number += 1

        async with asyncio.TaskGroup() as group:
            for number in range(OTHERS):
                group.create_task(client(number))
    return answers


def run(ports: Ports, count: int, begin: Callable[[str], None]) -> dict[str, Any]:
    """Measure others with and without stalled readers, by turns."""
    stretches: dict[str, list[list[Answer]]] = {"without": [], "with": []}
    for number in range(1, ROUNDS + 1):
        begin(f"nobody stalls, {number} of {ROUNDS}")
        stretches["without"].append(asyncio.run(others(ports, STRETCH_S)))
        memory = memory_mb()
        begin(f"{count} readers stall, {number} of {ROUNDS}")
        with stalled(ports, count):
            _wait(lambda: not metrics(ports)["running"], "their tokens are computed")
            stretches["with"].append(asyncio.run(others(ports, STRETCH_S)))
            held_mb = memory_mb()
        _wait(lambda: not metrics(ports)["requests in pending"], "all have left")
    return {
        "readers": count,
        "stretches": {which: [summary(one) for one in some] for which, some in stretches.items()},
        **{which: summary(list(chain.from_iterable(some))) for which, some in stretches.items()},
        "memory_mb": {"without": memory, "with": held_mb},
    }


def summary(answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """Return the times to the first token and between tokens."""
    return {
        "first_token": summary_ms([one.first_token_s for one in answers]),
        "between_tokens": summary_ms([gap for one in answers for gap in one.between_s()]),
    }


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + DONE_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"not within {DONE_S:g} s: {what}")
        time.sleep(POLL_S)
