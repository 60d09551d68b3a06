"""Three machines of one Ray cluster, each with a network of its own, and what operators do there.

The checker itself is on a fourth network, that of clients. All is in namespaces that end with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from contextlib import suppress
from pathlib import Path
from string import Template
from types import SimpleNamespace
from typing import Any

import httpx

from tests.environment import without_ray
from tests.fault.network import Network, namespace_of
from tests.fault.ray_nodes import RayNodes
from tests.fault.signals import is_running, is_stopped, named_pids
from tests.readme import ROOT

HEAD, WORKERS = 1, (2, 3)
MACHINES = (HEAD, *WORKERS)
MODEL, ROUTERS, ACTORS = "mesh-tiny", 2, 3
HTTP_PORT, GRPC_PORT, GCS_PORT, COMMAND_S = 8000, 9000, 6379, 240.0
FILE = Template("""\
applications:
- name: expertmesh
  import_path: router.app:build
  args:
    models: [{id: mesh-tiny, path: $weights}]
    experts: {actors: 3, min_copies: 2, num_cpus: 0.5}
    router: {replicas: 2, cache_tokens: 8192}
    gateway: {replicas: each_node, listen: {host: 0.0.0.0}}
    security: {keys_file: $keys}
""")


class Machines:
    """The cluster. Nothing here knows more of it than its commands, its ports and its processes."""

    def __init__(self, folder: Path) -> None:
        """Make the networks; ``folder`` is every machine's disk."""
        self._folder, self.network = folder, Network(1 + len(MACHINES))
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
        own = {"PATH": path, "HOME": str(folder), "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token"}
        self._environment, self._keys = without_ray() | own, str(folder / "keys.yaml")
        self.rays = RayNodes(self.network, folder, self._environment)
        self.run("ray", "get-auth-token", "--generate").check_returncode()
        roles = ("--role", "inference", "--role", "admin")
        made = self.run("expertmesh", "keys", "new", "checker", *roles, "--file", self._keys)
        self.key = self._environment["EXPERTMESH_API_KEY"] = made.stdout.strip()

    def start(self, machine: int) -> None:
        """Run ``ray start`` on a machine until it has joined."""
        first = ["--head", f"--port={GCS_PORT}", f"--temp-dir={self._folder / 'ray'}"]
        later = [f"--address={self.network.address(HEAD)}:{GCS_PORT}"]
        size = ("--num-cpus=4", "--object-store-memory=100000000")
        self.rays.start(machine, *size, *(first if machine == HEAD else later))

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the first machine; one that takes too long counts as failed."""
        limited = ("timeout", f"{COMMAND_S:g}", *command)
        return subprocess.run(
            self.network.inside(HEAD, *limited),
            env=self._environment,
            capture_output=True,
            text=True,
            umask=0o077,  # the files of its secrets are nobody else's
            check=False,
        )

    def deploy(self, weights: Path) -> subprocess.CompletedProcess[str]:
        """Deploy these weights under the same id, as an operator does; returns when they serve."""
        file = self._folder / "deployed.yaml"
        file.write_text(FILE.substitute(weights=weights, keys=self._keys))
        return self.run("expertmesh", "deploy", str(file), "--wait")

    def is_ready(self, machine: int) -> bool:
        """Return whether a machine's gateway says that it can serve."""
        url = f"http://{self.network.address(machine)}:{HTTP_PORT}/ready"
        with suppress(httpx.TransportError):
            return httpx.get(url, timeout=2.0, trust_env=False).status_code == 200
        return False

    def machine_of(self, pid: int) -> int:
        """Return the machine that a process is on; 0 for one that has ended."""
        with suppress(OSError):
            own = namespace_of(pid)
            return next(machine for machine in MACHINES if self.network.namespace(machine) == own)
        return 0

    def whole(self, actors: int) -> tuple[Any, str]:
        """Return the status, and what is missing; nothing is when the cluster is calm."""
        if unready := [machine for machine in MACHINES if not self.is_ready(machine)]:
            return None, f"not ready: machines {unready}"
        done = self.run("expertmesh", "status", "--json")
        if done.returncode:
            return None, done.stderr
        told: Any = json.loads(done.stdout, object_hook=lambda each: SimpleNamespace(**each))
        homes = sorted(self.machine_of(one.pid) for one in told.gateways)
        missing = {
            "copies": told.missing_experts or told.live_copies < told.min_copies or told.loading,
            f"gateways on {homes}": homes != list(MACHINES),
            f"routers: {len(told.routers)}": len(told.routers) != ROUTERS,
            f"actors: {len(told.actors)} of {actors}": len(told.actors) != actors,
            "a process": any(not is_running(pid) or is_stopped(pid) for pid in named_pids(told)),
        }
        return told, "; ".join(name for name, is_missing in missing.items() if is_missing)
