"""Serve's options of ``deploy/cluster.yaml``, on ports of one's own: what is shipped is used."""

from __future__ import annotations

import random
import socket
import sys
import sysconfig
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

import deploy
from router.serve.options import completed

DEPLOYED = Path(deploy.__file__).parent / "cluster.yaml"
QUIET_PORTS = range(20_000, 30_000, 2)
"""Below Serve's own (from 30000) and those of outgoing connections (from 32768 on Linux); the port
after each is for operators."""
SERVE_KEYS = ("proxy_location", "logging_config", "controller_options")
_INTERRUPTIBLE = (
    "import os, signal, sys;"
    "signal.signal(signal.SIGINT, signal.SIG_DFL);"
    "os.execv(sys.argv[1], sys.argv[1:])"
)


def serve_command(file: Path) -> list[str]:
    """Return ``serve run`` of a file on a Ray of its own, which Ctrl-C ends wherever it runs."""
    return interruptible("serve", "run", "-a", "local", str(file))


def interruptible(program: str, *words: str) -> list[str]:
    """Return a command of this Python's environment that Ctrl-C ends wherever it runs.

    A shell's background commands ignore it, and so do theirs. A process in between restores it: a
    ``preexec_fn`` makes a real fork of this one, and gRPC does not take forks well while it has
    channels open (https://github.com/grpc/grpc/issues/43055).
    """
    path = Path(sysconfig.get_path("scripts")) / program
    return [sys.executable, "-S", "-c", _INTERRUPTIBLE, str(path), *words]


def free_ports(count: int, apart_from: Collection[int] = ()) -> list[int]:
    """Return TCP ports that nobody listens on at the moment, none of them in ``apart_from``.

    Nor does anybody listen on the port after each.

    They are none that systems give to outgoing connections: a gateway begins to listen late, and by
    then such a port may be taken.
    """
    found: list[int] = []
    for port in random.sample(QUIET_PORTS, len(QUIET_PORTS)):
        if len(found) == count:
            break
        if port in apart_from:
            continue
        with socket.socket() as one, socket.socket() as next_one, suppress(OSError):
            one.bind(("", port))
            next_one.bind(("", port + 1))
            found.append(port)
    return found


def with_ports(args: Mapping[str, Any], http_port: int, grpc_port: int) -> dict[str, Any]:
    """Return an application's args whose gateways listen on these ports and the one after."""
    ports = {"http_port": http_port, "grpc_port": grpc_port, "admin_port": grpc_port + 1}
    gateway = dict(args.get("gateway") or {})
    return {**args, "gateway": {**gateway, "listen": {**gateway.get("listen", {}), **ports}}}


def shipped_document(http_port: int, grpc_port: int, file: Path = DEPLOYED) -> dict[str, Any]:
    """Return a deployment file with these ports."""
    document: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    [application] = document["applications"]
    application["args"] = with_ports(application["args"], http_port, grpc_port)
    return document


def serve_options() -> dict[str, Any]:
    """Return the arguments of ``serve.start`` that make it serve as the deployment file does."""
    document = completed({})
    return {key: document[key] for key in SERVE_KEYS}
