"""What a process asks of the readers on other nodes, and how long it waits for their answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from math import prod
from typing import Any, Protocol

from cluster.errors import error_from_wire, shown_name
from experts.checkpoint.shards import STORED_BYTES, TensorInfo

OPEN_TIMEOUT_S = 60.0

logger = logging.getLogger("expertmesh.peers")


class PeerError(Exception):
    """A peer failed, or its answer is wrong; the message is the reason."""


class Peer(Protocol):
    """A :class:`experts.checkpoint.remote.remote_reader.CheckpointReader` on another node.

    The reader ends when this object is dropped. A future with an exception means that the peer has
    failed; any other result is that of the reader.
    """

    node: str

    def open(self) -> Future[dict[str, Any]]:
        """Call the reader's ``open``."""
        ...

    def leaves(self, names: Sequence[str]) -> Future[dict[str, Any]]:
        """Call the reader's ``leaves``."""
        ...

    def read(self, name: str, begin: int, end: int) -> Future[dict[str, Any]]:
        """Call the reader's ``read``."""
        ...


class Neighbours(Protocol):
    """The cluster's other nodes."""

    def nodes(self) -> Sequence[str]:
        """Return the ids of the living nodes, without this node."""
        ...

    def connect(self, node: str, path: str) -> Peer:
        """Start a reader of the model at ``path`` on a node; returns at once."""
        ...


def tensors_of(opened: dict[str, Any]) -> dict[str, TensorInfo]:
    """Return the headers in a peer's answer.

    Raises :class:`PeerError` for a tensor whose number of bytes contradicts its shape.
    """
    tensors = {name: TensorInfo(*info) for name, info in opened["tensors"].items()}
    for name, info in tensors.items():
        if info.num_bytes != prod(info.shape) * STORED_BYTES.get(info.dtype, -1):
            raise PeerError(f"the bytes of tensor {shown_name(name)} do not match its shape")
    return tensors


def as_answered(peers: Sequence[Peer]) -> Iterator[tuple[Peer, Future[dict[str, Any]]]]:
    """Ask peers to open the checkpoint; yields each that has answered, then the silent peers.

    A peer that hashes its checkpoint is asked again, as long as it gets on.
    """
    waiting = {peer.open(): peer for peer in peers}
    hashed_bytes: dict[str, int] = {}
    deadline_s = time.monotonic() + OPEN_TIMEOUT_S
    while waiting:
        timeout_s = max(0.0, deadline_s - time.monotonic())
        done, _ = wait(waiting, timeout_s, FIRST_COMPLETED)
        if not done:
            break
        for answer in done:
            peer = waiting.pop(answer)
            done_bytes = _hashed_bytes(answer)
            if done_bytes is not None and done_bytes > hashed_bytes.get(peer.node, -1):
                if peer.node not in hashed_bytes:
                    logger.info("node %s is hashing its checkpoint first", peer.node[:10])
                hashed_bytes[peer.node] = done_bytes
                deadline_s = time.monotonic() + OPEN_TIMEOUT_S
            if done_bytes is None or time.monotonic() >= deadline_s:
                yield peer, answer
            else:
                waiting[peer.open()] = peer
    yield from ((peer, answer) for answer, peer in waiting.items())


def _hashed_bytes(answer: Future[dict[str, Any]]) -> int | None:
    """Return the progress of a peer that hashes its checkpoint; ``None`` for other answers."""
    return None if answer.exception() is not None else answer.result().get("hashed_bytes")


def answer_of(answer: Future[dict[str, Any]], timeout_s: float) -> dict[str, Any]:
    """Return a reader's answer.

    Raises :class:`PeerError` when it does not come in time, and for an error of the reader or of
    Ray.
    """
    try:
        # Not ``result``: its exception has a traceback whose frames refer to the peers and to this
        # future. This cycle would keep the peers' processes until the garbage collector runs, which
        # is rare here.
        failure = answer.exception(max(0.0, timeout_s))  # any error of Ray
    except FutureTimeoutError:
        answer.cancel()
        raise PeerError("did not answer in time") from None
    if failure is not None:
        raise PeerError(f"died ({type(failure).__name__})")
    reply = answer.result()
    if "error" in reply:
        raise PeerError(str(error_from_wire(reply["error"])))
    return reply
