"""Three machines of one Ray cluster, each with a network of its own, and what operators do there.

The checker itself is on a fourth network, that of clients. All is in namespaces that end with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import yaml

from tests.environment import without_ray
from tests.fault.network import Network, namespace_of
from tests.fault.signals import is_running, is_stopped
from tests.readme import ROOT

HEAD, WORKERS = 1, (2, 3)
MACHINES = (HEAD, *WORKERS)
MODEL = "mesh-tiny"
HTTP_PORT, GRPC_PORT, GCS_PORT = 8000, 9000, 6379
ACTORS, ROUTERS = 3, 2
STARTED_S, COMMAND_S, ASK_S, POLL_S = 120.0, 240.0, 10.0, 0.5


class Done(NamedTuple):
    """A command that has ended."""

    exit_code: int
    output: str
    errors: str


class Machines:
    """The cluster. Nothing here knows more of it than its commands, its ports and its processes."""

    def __init__(self, folder: Path) -> None:
        """Make the networks; ``folder`` is every machine's disk."""
        self.folder, self.network = folder, Network(1 + len(MACHINES))
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
        self._environment = without_ray() | {
            "PATH": path,
            "HOME": str(folder),
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
        }
        self._rays: dict[int, subprocess.Popen[bytes]] = {}
        self._must("ray", "get-auth-token", "--generate")
        roles = [word for role in ("inference", "admin") for word in ("--role", role)]
        key = self._must("expertmesh", "keys", "new", "checker", *roles, "--file", self._keys)
        self.key = key.splitlines()[0]
        self._environment["EXPERTMESH_API_KEY"] = self.key

    def start(self, machine: int) -> None:
        """Run ``ray start`` on a machine until it has joined."""
        options = ["--block", "--num-cpus=4", "--object-store-memory=100000000"]
        options.append(f"--node-ip-address={self.network.address(machine)}")
        if machine == HEAD:
            options += ["--head", f"--port={GCS_PORT}", f"--temp-dir={self.folder / 'ray'}"]
        else:
            options.append(f"--address={self.network.address(HEAD)}:{GCS_PORT}")
        log = self.folder / f"machine-{machine}.log"

        def is_up() -> bool:
            """Ray gives itself 30 s, which is little on a busy machine: a failed start repeats."""
            if not self.is_up(machine):
                with log.open("wb") as output:
                    self._rays[machine] = subprocess.Popen(
                        self.network.inside(machine, "ray", "start", *options),
                        env=self._environment,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                    )
            return b"--block" in log.read_bytes()

        wait(is_up, f"machine {machine} has joined", STARTED_S)

    def is_up(self, machine: int) -> bool:
        """Return whether the machine's Ray runs."""
        return machine in self._rays and self._rays[machine].poll() is None

    def raylet(self, machine: int) -> int:
        """Return the pid of a machine's raylet."""
        [pid] = [
            child.pid
            for child in psutil.Process(self._rays[machine].pid).children(recursive=True)
            if child.name() == "raylet"
        ]
        return pid

    def stop(self) -> None:
        """End every machine."""
        for ray in reversed(self._rays.values()):
            ray.terminate()
        for ray in self._rays.values():
            try:
                ray.wait(20)
            except subprocess.TimeoutExpired:
                ray.kill()
        self.network.close()

    def run(self, *command: str, machine: int = HEAD) -> Done:
        """Run a command on a machine; one that takes too long counts as failed."""
        words = self.network.inside(machine, *command)
        try:
            done = subprocess.run(
                words,
                env=self._environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=COMMAND_S,
                umask=0o077,  # the files of its secrets are nobody else's
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Done(-1, "", f"no end within {COMMAND_S:g} s")
        return Done(done.returncode, done.stdout, done.stderr)

    def _must(self, *command: str) -> str:
        done = self.run(*command, machine=0)
        if done.exit_code:
            raise RuntimeError(f"{' '.join(command)}: {done.errors}")
        return done.output

    def deploy(self, weights: Path) -> Done:
        """Deploy these weights under the same id, as an operator does; returns when they serve."""
        args: dict[str, Any] = {
            "models": [{"id": MODEL, "path": str(weights)}],
            "experts": {"actors": ACTORS, "min_copies": 2, "num_cpus": 0.5},
            "router": {"replicas": ROUTERS, "cache_tokens": 8192},
            "gateway": {"replicas": "each_node", "listen": {"host": "0.0.0.0"}},
            "security": {"keys_file": self._keys},
        }
        application = {"name": "expertmesh", "import_path": "router.app:build", "args": args}
        file = self.folder / f"{weights.name}.yaml"
        file.write_text(yaml.safe_dump({"applications": [application]}))
        return self.run("expertmesh", "deploy", str(file), "--wait")

    def status(self) -> dict[str, Any] | None:
        """Return what ``expertmesh status`` prints on the first machine where it is answered."""
        for machine in MACHINES:
            done = self.run("expertmesh", "status", "--json", machine=machine)
            if done.exit_code == 0:
                return dict(json.loads(done.output))
        return None

    def is_ready(self, machine: int) -> bool:
        """Return whether a machine's gateway says that it can serve."""
        url = f"http://{self.network.address(machine)}:{HTTP_PORT}/ready"
        try:
            return httpx.get(url, timeout=2.0, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def machine_of(self, pid: int) -> int:
        """Return the machine that a process is on; 0 for one that has ended."""
        try:
            own = namespace_of(pid)
        except OSError:
            return 0
        return next(m for m in MACHINES if self.network.namespace(m) == own)

    def cut(self, machine: int) -> None:
        """Lose all packets between a machine and everything else."""
        for other in {0, *MACHINES} - {machine}:
            self.network.cut(*sorted((machine, other)))

    def heal(self, machine: int) -> None:
        """Undo :meth:`cut`."""
        for other in {0, *MACHINES} - {machine}:
            self.network.heal(*sorted((machine, other)))

    def whole(self, actors: int) -> tuple[dict[str, Any] | None, str]:
        """Return the status and what is missing in it; nothing is when the cluster is calm."""
        unready = [machine for machine in MACHINES if not self.is_ready(machine)]
        if unready:
            return None, f"not ready: machines {unready}"
        told = self.status()
        if told is None:
            return None, "no status"
        homes = sorted(self.machine_of(one["pid"]) for one in told["gateways"])
        pids = pids_of(told)
        missing = {
            "copies": told["missing_experts"] or told["live_copies"] < told["min_copies"],
            f"gateways: {homes}": homes != list(MACHINES),
            f"routers: {len(told['routers'])}": len(told["routers"]) != ROUTERS,
            f"actors: {len(told['actors'])} of {actors}": len(told["actors"]) != actors,
            "loading": told["loading"],
            "gone or stopped": any(not is_running(pid) or is_stopped(pid) for pid in pids),
        }
        return told, "; ".join(name for name, is_missing in missing.items() if is_missing)

    @property
    def _keys(self) -> str:
        return str(self.folder / "keys.yaml")


def pids_of(told: dict[str, Any]) -> list[int]:
    """Return every pid that a status names."""
    parts = [*told["routers"], *told["gateways"], *told["actors"]]
    return [told["controller_pid"], *(part["pid"] for part in parts)]


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal, and see that it hit; a process that is gone already counts as hit."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
    hit = {
        signal.SIGKILL: lambda: not is_running(pid),
        signal.SIGSTOP: lambda: is_stopped(pid) or not is_running(pid),
        signal.SIGCONT: lambda: not is_stopped(pid),
    }[number]
    wait(hit, f"{number.name} to {pid}", ASK_S)


def wait(condition: Callable[[], object], what: str, timeout_s: float) -> None:
    """Wait until a condition holds; raises ``TimeoutError``."""
    pause, deadline_s = threading.Event(), time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        pause.wait(POLL_S)
