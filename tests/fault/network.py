"""Nodes on this machine with networks of their own, whose links can be cut: Linux namespaces.

Each node has a network namespace, and a pair of virtual interfaces to every other node. A cut link
loses all packets both ways, as a switch without power does: nobody is told, and connections stay.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NoReturn

NOBODY = "02:00:00:00:00:01"
"""An address that no interface has."""


_UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")


def enter(module: str, *arguments: str) -> NoReturn:
    """Run a module anew, as root of namespaces of its own; needs no rights of this process.

    They end with the module, however it ends, and with them every process in them. A shell is their
    first process: it collects what Ray's processes leave behind.
    """
    shell = ["sh", "-c", '"$@"; exit $?', "sh"]
    command = [*_UNSHARE, "--mount-proc", *shell, sys.executable, "-m", module, *arguments]
    os.execvp(command[0], command)


def why_not_permitted() -> str:
    """Return why this process may make no namespaces, or nothing if it may."""
    done = subprocess.run(
        [*_UNSHARE, "--mount-proc", "ip", "link"], capture_output=True, text=True, check=False
    )
    return done.stderr.strip()


class Network:
    """Nodes by number; node 0 is in this process's own namespace."""

    def __init__(self, nodes: int) -> None:
        """Make the namespaces and links; needs the rights that :func:`enter` gives."""
        self._holders: dict[int, subprocess.Popen[bytes]] = {}
        for node in range(1, nodes):
            self._holders[node] = subprocess.Popen(
                ["unshare", "--net", "sh", "-c", "echo; exec sleep infinity"],
                stdout=subprocess.PIPE,
            )
            output = self._holders[node].stdout
            assert output is not None
            output.readline()  # the namespace is there
        for node in range(nodes):
            self._ip(node, "link set lo up")
            self._ip(node, f"address add {self.address(node)}/32 dev lo")
        for a in range(nodes):
            for b in range(a + 1, nodes):
                pid = self._holders[b].pid
                self._ip(a, f"link add {_name(a, b)} type veth peer name {_name(b, a)} netns {pid}")
                for here, there in ((a, b), (b, a)):
                    self._ip(here, f"link set {_name(here, there)} up")
                    route = f"{self.address(there)}/32 dev {_name(here, there)}"
                    self._ip(here, f"route add {route} src {self.address(here)}")

    def address(self, node: int) -> str:
        """Return the address of a node."""
        return f"10.77.0.{node + 1}"

    def inside(self, node: int, *command: str) -> list[str]:
        """Return a command that runs on a node."""
        if node == 0:
            return list(command)
        return ["nsenter", f"--net=/proc/{self._holders[node].pid}/ns/net", *command]

    def namespace(self, node: int) -> str:
        """Return the name of a node's namespace, as :func:`namespace_of` does."""
        return namespace_of(self._holders[node].pid if node else os.getpid())

    def cut(self, a: int, b: int) -> None:
        """Lose all packets between two nodes."""
        for here, there in ((a, b), (b, a)):
            neighbour = f"{self.address(there)} lladdr {NOBODY} dev {_name(here, there)}"
            self._ip(here, f"neighbour replace {neighbour} nud permanent")

    def heal(self, a: int, b: int) -> None:
        """Lose no more packets between two nodes."""
        for here, there in ((a, b), (b, a)):
            neighbour = f"{self.address(there)} dev {_name(here, there)}"
            self._ip(here, f"neighbour del {neighbour}")

    def cut_off(self, node: int) -> None:
        """Lose all packets between a node and every other."""
        for other in {0, *self._holders} - {node}:
            self.cut(node, other)

    def reconnect(self, node: int) -> None:
        """Undo :meth:`cut_off`."""
        for other in {0, *self._holders} - {node}:
            self.heal(node, other)

    def close(self) -> None:
        """End the namespaces, once no process is in them."""
        for holder in self._holders.values():
            holder.kill()
            holder.wait()

    def _ip(self, node: int, words: str) -> None:
        subprocess.run(self.inside(node, "ip", *words.split()), check=True)


def namespace_of(pid: int) -> str:
    """Return the name of a process's network namespace."""
    return os.readlink(f"/proc/{pid}/ns/net")


def _name(here: int, there: int) -> str:
    return f"v{here}to{there}"
