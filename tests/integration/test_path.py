"""The files that a completion over HTTP runs, in all processes of the shipped deployment."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.shipped import free_ports
from cluster.native import native
from tests.cluster_fixture import TINY, wait_until
from tests.readme import ROOT
from tests.serve_run import copy_with_ports, expertmesh_serve, ready_serve

SITE = """
import json, os, sys, threading, time
from pathlib import Path

folder, root = Path(os.environ["TRACE_FOLDER"]), os.environ["TRACE_ROOT"]
roots = tuple(f"{root}/{name}/" for name in ("router", "experts", "cluster", "expertmesh"))
calls, phase = {}, [""]

def note(frame, event, argument):
    name = frame.f_code.co_filename
    if phase[0] and event == "call" and name.startswith(roots):
        of_file = calls.setdefault(name[len(root) + 1 :], {})
        of_file.setdefault(frame.f_code.co_qualname, {})[phase[0]] = None

def follow():
    while True:
        time.sleep(0.002)
        told = (folder / "phase").read_text()
        if told != phase[0]:
            phase[0] = told
            part = folder / f"{os.getpid()}.new"
            part.write_text(json.dumps([told, calls]))
            part.rename(folder / f"{os.getpid()}.json")

threading.Thread(target=follow, daemon=True).start()
threading.setprofile(note)
sys.setprofile(note)
"""
"""Python runs it at the start of each process. It notes which functions are called in which phase,
the word in the file ``phase``, and says so when the phase changes."""
KINDS = {"Gateway-": "gateway", "Router-": "router", "RemoteExpertActor": "actor"}
IDLE_S, REQUESTS, LIMIT_S = 5.0, 5, 60.0
LATE = {
    "cluster/wire/arrays.py",
    "cluster/transport/stream/late.py",
    "cluster/transport/stream/link.py",
    "cluster/transport/stream/writer.py",
    "router/moe/answer_times.py",
    "router/moe/copy_choice.py",
    "router/moe/failures.py",
    "router/moe/pending.py",
}
"""What also runs where an answer of an actor is late, as on a busy machine, or is looked at by the
actor's self-test, on a thread of its own."""
NATIVE = pytest.mark.parametrize("has_native", [] if native is None else [True])
"""Without native code other files run (``tests/unit/router/engine/test_path.py``)."""


class Traced:
    """The processes of a server, and the functions that each calls."""

    def __init__(self, folder: Path) -> None:
        """Nothing is noted before a phase begins; ``folder`` is that of the traces."""
        self._folder, self._num_processes = folder, 0
        self._write("")

    def _write(self, phase: str) -> None:
        part = self._folder / "phase.new"
        part.write_text(phase)
        part.rename(self._folder / "phase")

    def begin(self, phase: str) -> None:
        """Begin a phase in all processes."""
        self._write(phase)
        wait_until(lambda: self._have_begun(phase), f"all have begun {phase!r}", LIMIT_S)

    def _have_begun(self, phase: str) -> bool:
        found = [(kind, told) for kind, told, _ in self._traces()]
        return {kind for kind, _ in found} == {*KINDS.values()} and all(
            told == phase for _, told in found
        )

    def _traces(self) -> list[tuple[str, str, dict[str, dict[str, dict[str, None]]]]]:
        found = []
        for file in self._folder.glob("*.json"):
            try:
                [title, *_] = psutil.Process(int(file.stem)).cmdline()
            except psutil.NoSuchProcess:
                continue
            kinds = [kind for part, kind in KINDS.items() if part in title]
            if kinds:
                found.append((kinds[0], *json.loads(file.read_text())))
        return found

    def path(self) -> dict[str, set[str]]:
        """Return the files of functions that requests alone call, by the kind of process."""
        found: dict[str, set[str]] = {kind: set() for kind in KINDS.values()}
        for kind, _, calls in self._traces():
            for file, functions in calls.items():
                if any("idle" not in phases for phases in functions.values()):
                    found[kind].add(file)
        return found


def printed() -> dict[str, set[str]]:
    """Return the files that ARCHITECTURE lists, by the kind of process."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    steps = text.partition("**A decode step**")[2].partition("**An example.**")[0]
    own, _, actors = steps.partition("**Over in the expert actor's process**")
    [also] = re.findall(r"also uses ([\d, and]+):", actors)
    numbered = [
        re.findall(r"^ *\d+\. `([\w/]+\.py)`:", part, re.MULTILINE) for part in (own, actors)
    ]
    shared = {numbered[0][int(number) - 1] for number in re.findall(r"\d+", also)}
    found = {"gateway": set(), "router": {*numbered[0]}, "actor": {*numbered[1]} | shared}
    for kind, folder, names in re.findall(
        r"^\| (\w+) \| (?:`([\w/]+)`)? ?\| (`.*`) \|$", text, re.M
    ):
        files = {f"{folder}{name}.py" for name in re.findall(r"`([\w/]+)`", names)}
        for each in ("gateway", "router") if kind == "both" else (kind,):
            found.get(each, set()).update(files)
    return found


@NATIVE
def test_a_completion_runs_the_files_of_the_document(tmp_path: Path, has_native: bool) -> None:
    http_port, grpc_port = free_ports(2)
    file = copy_with_ports(tmp_path, http_port, grpc_port)
    site, folder = tmp_path / "site", tmp_path / "trace"
    site.mkdir()
    folder.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    traced = Traced(folder)
    variables = {"TRACE_FOLDER": str(folder), "TRACE_ROOT": str(ROOT)}
    variables["PYTHONPATH"] = f"{site}{os.pathsep}{ROOT}"  # not the installed package
    body = {"model": TINY, "prompt": "the", "max_tokens": 3}

    def ask(client: httpx.Client) -> None:
        client.post("/v1/completions", json=body).raise_for_status()

    with (
        ready_serve(
            file, tmp_path / "log", http_port, lambda *at: expertmesh_serve(*at, **variables)
        ),
        httpx.Client(base_url=f"http://127.0.0.1:{http_port}", timeout=LIMIT_S) as client,
    ):
        for _ in range(REQUESTS):
            ask(client)
        traced.begin("idle")
        time.sleep(IDLE_S)  # what happens from time to time
        for _ in range(REQUESTS):
            traced.begin("request")
            ask(client)
            traced.begin("")
        path = traced.path()
    listed = printed()
    for kind, files in path.items():
        assert listed[kind] - files == set(), kind
        assert files - listed[kind] <= LATE, kind
