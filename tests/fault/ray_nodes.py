"""Nodes of Ray on the networks of :mod:`tests.fault.network`, made by ``ray start``."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from tests.fault.network import Network
from tests.fault.signals import is_running

LIMIT_S, POLL_S, END_S = 150.0, 0.2, 10.0


def wait_for(condition: Callable[[], object], what: str, limit_s: float = LIMIT_S) -> None:
    """Wait until a condition holds; raises ``TimeoutError``."""
    pause, deadline_s = threading.Event(), time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{what}: not within {limit_s} s")
        pause.wait(POLL_S)


class RayNodes:
    """The nodes that run; their logs are in ``folder``."""

    def __init__(self, network: Network, folder: Path, environment: Mapping[str, str]) -> None:
        self._network, self._folder, self._environment = network, folder, environment
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, node: int, *options: str) -> None:
        """Start Ray on a node, and wait until it has joined.

        Ray gives a node 30 s to start, which is little where many start on few cores: a start that
        failed is repeated.
        """
        address = f"--node-ip-address={self._network.address(node)}"
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", address, *options]
        log = self._log(node)

        def has_joined() -> bool:
            if not self.is_up(node):
                self._end(node)
                with log.open("wb") as output:
                    self._running[node] = subprocess.Popen(
                        self._network.inside(node, *ray),
                        env=self._environment,
                        stdout=output,
                        stderr=output,
                    )
            return b"--block" in log.read_bytes()

        wait_for(has_joined, f"node {node} has joined")

    def is_up(self, node: int) -> bool:
        """Return whether Ray runs on a node, or is about to.

        ``ray start --block`` goes on where its raylet has ended well, as that of a drained node.
        """
        if node not in self._running or self._running[node].poll() is not None:
            return False
        return b"--block" not in self._log(node).read_bytes() or bool(self._raylets(node))

    def end_raylet(self, node: int) -> None:
        """Kill the raylet of a node, with which its Ray ends."""
        self._raylets(node)[0].kill()
        wait_for(lambda: not self.is_up(node), f"Ray ends on node {node}")

    def _raylets(self, node: int) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(self._running[node].pid).children()
            return [one for one in children if one.name() == "raylet" and is_running(one.pid)]
        return []

    def _log(self, node: int) -> Path:
        return self._folder / f"node-{node}.log"

    def _end(self, node: int) -> None:
        if process := self._running.pop(node, None):
            process.terminate()
            process.wait(LIMIT_S)

    def stop(self) -> None:
        """End all nodes; what is left ends with the namespaces."""
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
