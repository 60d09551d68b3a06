"""Compressed bodies: gzip and deflate (zlib's format), as the protocol's clients send them."""

from __future__ import annotations

import asyncio
import gzip
import zlib

from cluster.errors import InvalidRequestError, TooLargeError, shown

FIELD = "Content-Encoding"
MIN_COMPRESSED_BYTES = 1024
"""A smaller reply is not compressed: it would hardly become smaller."""
_LEVEL = 1
_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


class Inflater:
    """Undoes the compression of one body, piece by piece, up to a limit."""

    def __init__(self, encoding: str, limit_bytes: int) -> None:
        """Raises :class:`InvalidRequestError` for an encoding that is not known."""
        if encoding not in _WINDOWS:
            raise InvalidRequestError(
                f"must be {', '.join(_WINDOWS)} or identity; got {shown(encoding)}", FIELD
            )
        self._encoding = encoding
        self._limit_bytes = limit_bytes
        self._num_bytes = 0
        self._stream = zlib.decompressobj(_WINDOWS[encoding])

    def feed(self, piece: bytes) -> bytes:
        """Return the bytes of a piece.

        Raises :class:`TooLargeError` beyond the limit, before memory is taken for more, and
        :class:`InvalidRequestError` for damaged bytes.
        """
        room = self._limit_bytes - self._num_bytes
        try:
            data = self._stream.decompress(piece, room + 1)
        except zlib.error:
            raise InvalidRequestError(f"the body is not {self._encoding}", FIELD) from None
        if len(data) > room:
            raise TooLargeError(f"the body is over the limit of {self._limit_bytes} bytes")
        self._num_bytes += len(data)
        return data

    def finish(self) -> None:
        """Raise :class:`InvalidRequestError` unless the compressed body has ended, with nothing
        after it."""
        if not self._stream.eof or self._stream.unused_data:
            raise InvalidRequestError(
                f"the body is not one complete {self._encoding} stream", FIELD
            )


def accepted_encoding(accept: str) -> str | None:
    """Return the first encoding of an ``Accept-Encoding`` that a reply may have, or ``None``."""
    for part in accept.lower().split(","):
        encoding, _, quality = part.partition(";")
        name, is_accepted = encoding.strip(), quality.replace(" ", "") not in ("q=0", "q=0.0")
        if name in _WINDOWS and is_accepted:
            return name
    return None


async def compressed(body: bytes, encoding: str) -> bytes:
    """Return a body in an encoding; other requests go on meanwhile."""
    return await asyncio.to_thread(_compress, body, encoding)


def _compress(body: bytes, encoding: str) -> bytes:
    if encoding == "gzip":
        return gzip.compress(body, _LEVEL, mtime=0)
    return zlib.compress(body, _LEVEL)
