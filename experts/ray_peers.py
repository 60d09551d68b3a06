"""The other nodes of a Ray cluster as :mod:`experts.checkpoint.remote_files` asks them for a
checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from experts.checkpoint.remote_reader import CheckpointReader


class RayNeighbours:
    """The living nodes of the cluster that this process is in; none where Ray does not run."""

    def nodes(self) -> Sequence[str]:
        """See :class:`experts.checkpoint.remote_files.Neighbours`."""
        if not ray.is_initialized():
            return []
        own = ray.get_runtime_context().get_node_id()
        return [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeID"] != own]

    def connect(self, node: str, path: str) -> RayPeer:
        """See :class:`experts.checkpoint.remote_files.Neighbours`."""
        return RayPeer(node, path)


class RayPeer:
    """A reader on another node; Ray ends its process when this object is let go."""

    def __init__(self, node: str, path: str) -> None:
        """Ask Ray for the reader; returns at once."""
        self.node = node
        self._reader = (
            _remote_reader()
            .options(
                num_cpus=0,
                enable_task_events=False,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote(path)
        )

    def open(self) -> Future[dict[str, Any]]:
        """See :class:`experts.checkpoint.remote_files.Peer`."""
        return self._reader.open.remote().future()  # type: ignore[no-any-return]

    def read(self, name: str, begin: int, end: int) -> Future[dict[str, Any]]:
        """See :class:`experts.checkpoint.remote_files.Peer`."""
        return self._reader.read.remote(name, begin, end).future()  # type: ignore[no-any-return]


def _remote_reader() -> Any:
    return ray.remote(CheckpointReader)
