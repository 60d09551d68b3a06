"""The checksum of frames that leave a host without TLS: CRC-32C, four bytes after the frame.

A frame over TLS has TLS's own, and a Unix socket's memory is the host's. TCP's sum of 16 bits and
a network card's own checks let damage pass now and then (Stone and Partridge, "When the CRC and TCP
checksum disagree", SIGCOMM 2000), and a flipped bit of a row is a wrong token.
"""

from __future__ import annotations

import crc32c

from cluster.wire.frames import Buffer, Buffers

CHECKSUM_BYTES = 4


def sealed(buffers: Buffers) -> Buffers:
    """Return a frame with its checksum as the last buffer; nothing is copied."""
    checksum = 0
    for buffer in buffers:
        checksum = crc32c.crc32c(buffer, checksum)
    return *buffers, checksum.to_bytes(CHECKSUM_BYTES, "little")


def unsealed(data: Buffer) -> memoryview | None:
    """Return the frame in front of its checksum, without a copy; ``None`` if it is damaged."""
    view = memoryview(data)
    frame = view[:-CHECKSUM_BYTES]
    checksum = crc32c.crc32c(frame).to_bytes(CHECKSUM_BYTES, "little")
    return frame if checksum == view[-CHECKSUM_BYTES:] else None
