"""Mutated wires for every port of a running deployment; each tells what came back."""

from __future__ import annotations

import http.client
import random
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc

from benchmarks.fuzzing.mutate import mutated
from benchmarks.fuzzing.requests import bodies, messages
from benchmarks.fuzzing.wires import joined, message
from cluster.transport.stream.connect import greet, open_socket
from cluster.transport.stream.handshake import Network, StreamOffer
from cluster.wire.checksum import sealed, unsealed
from cluster.wire.frames import DispatchFrame, ErrorFrame, decode
from cluster.wire.tensors import TORCH_DTYPES
from router.client.access import admin_address_of

ANSWER_S = 10.0
"""For a whole answer, where there must be one."""
IDLE_S = 0.25
"""For the next bytes of whatever a port says to bytes that mean nothing."""
METHODS = (
    "/expertmesh.v1.Inference/Generate",
    "/expertmesh.v1.Inference/GenerateStream",
    "/expertmesh.v1.Inference/GetModelInfo",
    "/expertmesh.v1.Inference/Tokenize",
    "/expertmesh.v1.Inference/Detokenize",
    "/expertmesh.v1.Admin/GetStatus",
    "/grpc.health.v1.Health/Check",
    "/expertmesh.v1.Inference/Nothing",
)
STREAMED = METHODS[1:2]
PATHS = ("/v1/completions", "/v1/chat/completions")


@dataclass(frozen=True, slots=True)
class Actor:
    """An expert actor: Ray's handle, and experts that it holds as (model, layer, expert)."""

    handle: Any
    experts: Sequence[tuple[str, int, int]]


@dataclass(frozen=True, slots=True)
class Places:
    """Where a deployment can be reached, from outside and inside.

    ``ports`` are the TCP addresses on which gateways listen themselves, behind the proxy.
    """

    model: str
    hidden_size: int
    http: tuple[str, int]
    grpc: tuple[str, int]
    actors: Sequence[Actor]
    ports: Sequence[tuple[str, int]]


class Wires:
    """Sends wires; of one number and seed always the same bytes, but for keys and deadlines."""

    def __init__(self, places: Places, seed: int) -> None:
        self._places = places
        self._seed = seed
        self._bodies = bodies(places.model)
        self._messages = messages(places.model)
        address = "{}:{}".format(*places.grpc)
        self._channel = grpc.insecure_channel(address)
        self._admin_channel = grpc.insecure_channel(admin_address_of(address))
        self.kinds: dict[str, Callable[[random.Random], str]] = {
            "HTTP bytes": self._http_bytes,
            "HTTP body": self._http_body,
            "HTTP/2 bytes": self._http2_bytes,
            "gRPC message": self._grpc_message,
            "stream, no key": self._stranger,
            "stream, with a key": self._router,
            "frame by Ray": self._by_ray,
            "gateway's own port": self._gateway_port,
        }

    def close(self) -> None:
        """Close the connections of the gRPC calls."""
        self._channel.close()
        self._admin_channel.close()

    def send(self, number: int) -> tuple[str, str]:
        """Send one wire; returns its kind and what came back, in a word or two."""
        source = random.Random(f"{self._seed}-{number}")
        names = list(self.kinds)
        name = names[number % len(names)]
        try:
            return name, self.kinds[name](source)
        except TimeoutError:
            return name, "no answer"
        except (OSError, http.client.HTTPException):
            return name, "closed"

    def _http_bytes(self, source: random.Random) -> str:
        data = mutated(source, [_http_request(one, self._bodies) for one in PATHS])
        return _status_line(said(self._places.http, data))

    def _http_body(self, source: random.Random) -> str:
        body = mutated(source, self._bodies)
        connection = http.client.HTTPConnection(*self._places.http, timeout=ANSWER_S)
        try:
            headers = {"content-type": "application/json"}
            connection.request("POST", source.choice(PATHS), body, headers)
            answer = connection.getresponse()
            answer.read()
            return str(answer.status)
        except TimeoutError:  # a good request for very many tokens
            return "left"
        finally:
            connection.close()

    def _http2_bytes(self, source: random.Random) -> str:
        seeds = [http2_call(METHODS[0], one) for one in self._messages]
        return _answered(said(self._places.grpc, mutated(source, seeds)))

    def _grpc_message(self, source: random.Random) -> str:
        data, method = mutated(source, self._messages), source.choice(METHODS)
        channel = self._admin_channel if ".Admin/" in method else self._channel
        try:
            if method in STREAMED:
                for _ in channel.unary_stream(method)(data, timeout=ANSWER_S):
                    pass
            else:
                channel.unary_unary(method)(data, timeout=ANSWER_S)
        except grpc.RpcError as error:
            return str(error.code().name)
        return "OK"

    def _stranger(self, source: random.Random) -> str:
        offer = self._offer(source)
        seeds = [message(offer.key_id + bytes(48), 0), message(self._frames(source)[0])]
        with open_socket(offer, None) as sock:
            return _answered(_exchanged(sock, mutated(source, seeds))[32:])  # after its nonce

    def _router(self, source: random.Random) -> str:
        offer = self._offer(source)
        frames = self._frames(source)
        channel = greet(open_socket(offer, None), offer)
        is_checked = offer.network is Network.TCP
        try:
            data = mutated(source, [message(_sealed(one, is_checked)) for one in frames])
            if source.random() < 0.5:  # the stream is good, the frame in it is not
                data = message(_sealed(mutated(source, frames), is_checked))
            channel.sock.setblocking(True)
            return _frames_in(_exchanged(channel.sock, data), is_checked)
        finally:
            channel.close()

    def _by_ray(self, source: random.Random) -> str:
        import ray

        actor = source.choice(self._places.actors)
        is_whole = source.random() < 0.5  # else the checksum is wrong
        data = _sealed(mutated(source, [self._frame(source, actor)]), is_whole)
        answer = ray.get(actor.handle.compute.remote(data), timeout=ANSWER_S)
        return _kind_of(answer, is_checked=True)

    def _gateway_port(self, source: random.Random) -> str:
        place = source.choice(self._places.ports)
        seeds = [
            _http_request(PATHS[0], self._bodies),
            http2_call(METHODS[0], self._messages[0]),
            struct.pack(">I", 66) + b"\x91\xd9\x40" + b"0" * 64,  # a router's hello, wrong secret
        ]
        return _answered(said(place, mutated(source, seeds)))

    def _offer(self, source: random.Random) -> StreamOffer:
        import ray

        actor = source.choice(self._places.actors)
        network = source.choice((Network.UNIX, Network.TCP))
        offer: StreamOffer = ray.get(actor.handle.offer_stream.remote(network), timeout=ANSWER_S)
        return offer

    def _frames(self, source: random.Random) -> list[bytes]:
        return [self._frame(source, actor) for actor in self._places.actors]

    def _frame(self, source: random.Random, actor: Actor) -> bytes:
        """Return a good frame for an expert that the actor holds."""
        held, layer_id, expert_id = source.choice(actor.experts)
        size = self._places.hidden_size
        return joined(
            DispatchFrame(
                request_id=1,
                num_rows=3,
                time_left_s=60,
                layer_id=layer_id,
                row_shape=(size,),
                model=held,
                expert_ids=(expert_id,),
                num_tokens_per_expert=(3,),
                dtype="float32",
                rows=bytes(3 * size * TORCH_DTYPES["float32"].itemsize),
            )
        )


def _http_request(path: str, all_bodies: Sequence[bytes]) -> bytes:
    body = all_bodies[0]
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return head.encode() + b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body


def http2_call(method: str, data: bytes) -> bytes:
    """Return a connection's first bytes with one gRPC call, every header in plain text.

    ``method`` may have any characters up to 255, each of which is a byte.
    """

    def http2_frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload

    headers = {
        ":method": "POST", ":scheme": "http", ":path": method, ":authority": "x",
        "content-type": "application/grpc", "te": "trailers",
    }  # fmt: skip
    packed = b"".join(
        b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode("latin-1")
        for name, value in headers.items()
    )
    return (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + http2_frame(4, 0, 0, struct.pack(">HI", 4, 65_535))
        + http2_frame(1, 4, 1, packed)
        + http2_frame(0, 1, 1, b"\x00" + struct.pack(">I", len(data)) + data)
    )


def said(place: tuple[str, int], data: bytes) -> bytes:
    """Connect, send bytes, and return what comes until the other end closes or falls silent."""
    with socket.create_connection(place, ANSWER_S) as sock:
        return _exchanged(sock, data)


def _exchanged(sock: socket.socket, data: bytes) -> bytes:
    """Send bytes and return what comes until the other end closes or falls silent."""
    said = b""
    sock.settimeout(ANSWER_S)
    with suppress(ConnectionError):
        sock.sendall(data)
        sock.settimeout(IDLE_S)
        with suppress(TimeoutError):
            while piece := sock.recv(1 << 16):
                said += piece
    return said


def _status_line(said: bytes) -> str:
    words = said.split(b" ", 2)
    is_http = len(words) > 1 and words[0].startswith(b"HTTP/") and words[1].isdigit()
    return words[1].decode() if is_http else _answered(said)


def _answered(said: bytes) -> str:
    return "bytes" if said else "nothing"


def _sealed(frame: bytes, is_checked: bool) -> bytes:
    """Return a frame with its checksum where the other end looks for one."""
    return b"".join(sealed((frame,))) if is_checked else frame


def _frames_in(said: bytes, is_checked: bool) -> str:
    """Return of which kinds the messages of a stream are."""
    kinds, place = set(), 0
    while place + 16 <= len(said):
        length, _ = struct.unpack_from("<QQ", said, place)
        data = said[place + 16 : place + 16 + length]
        if len(data) < length:
            break
        kinds.add(_kind_of(data, is_checked))
        place += 16 + length + -length % 16
    return ", ".join(sorted(kinds)) or "nothing"


def _kind_of(data: bytes, is_checked: bool) -> str:
    intact = unsealed(data) if is_checked else data
    assert intact is not None  # an actor's answer comes whole
    if not intact:
        return "too long"
    frame = decode(intact)
    return frame.kind if isinstance(frame, ErrorFrame) else "rows"
