"""Hidden states by which tests recognise a prompt in the frames to expert actors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.wire.frames import DispatchFrame
from tests.local_cluster import LocalCluster, greedy_request

LAYER = 1
ROW_BYTES = 64 * 4
"""A hidden state of :func:`tests.checkpoints.save_mixtral` in float32."""


def rows_of(frame: DispatchFrame) -> set[bytes]:
    """Return the rows of a frame."""
    data = bytes(frame.rows)
    return {data[at : at + ROW_BYTES] for at in range(0, len(data), ROW_BYTES)}


def last_rows(folder: Path, prompt: Sequence[int]) -> set[bytes]:
    """Return the hidden state in :data:`LAYER` of a prompt's last token."""
    return _rows_in_layer(folder, prompt) - _rows_in_layer(folder, prompt[:-1])


def _rows_in_layer(folder: Path, prompt: Sequence[int]) -> set[bytes]:
    clean = LocalCluster(folder)
    clean.generate(greedy_request("p", prompt, 1))
    clean.close()
    frames = [frame for frame in clean.transport.frames if frame.layer_id == LAYER]
    return set().union(*map(rows_of, frames))
