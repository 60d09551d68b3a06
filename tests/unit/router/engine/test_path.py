"""The files that a decode step passes, from the engine's step to a sampled token."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from cluster.native import native
from cluster.transport.base import Call
from cluster.transport.stream import client
from cluster.transport.stream.client import StreamTransport
from cluster.transport.stream.connect import Connector
from cluster.transport.stream.server import StreamServer
from cluster.wire.frames import RowsFrame, decode
from experts import actor as actor_module
from router.engine.sampling import sample
from router.engine.sequence import ScheduledChunk
from tests.unit.cluster.transport.wired import LENGTH, Wired
from tests.unit.experts.local_actor import LIMIT_S, frame_of, local_actor, rows_of

ROOT = Path(__file__).parents[4]
MAX_FILES = 16
TRACED = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"
DOCUMENT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
ROUTER, ACTOR = (
    DOCUMENT.partition(begin)[2].partition(end)[0]
    for begin, end in (
        ("**A decode step**", "**Over in the expert actor's process**"),
        ("**Over in the expert actor's process**", "**An example.**"),
    )
)
TORCH = DOCUMENT.partition("On devices, and without native code")[2].partition("\n\n")[0]


def numbered(text: str) -> list[str]:
    """Return the files that a numbered list begins its entries with."""
    return re.findall(r"^ *\d+\. `([\w/]+\.py)`:", text, re.MULTILINE)


def named(text: str) -> set[str]:
    """Return all files that a text names by their whole path."""
    return set(re.findall(r"`((?:router|experts|cluster)/[\w/]+\.py)`", text))


class Trace:
    """The product's files whose functions are called, in order, until a token is sampled.

    They begin with the next call of ``begins_at``, where it is set.
    """

    def __init__(self) -> None:
        self.files: dict[str, None] = {}
        self.begins_at: CodeType | None = None
        self._is_sampled = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """A profile function in the sense of ``sys.setprofile``."""
        if self.begins_at not in (None, frame.f_code):
            return
        self.begins_at = None
        if frame.f_code is sample.__code__ and event == "return":
            self._is_sampled = True
        path = Path(frame.f_code.co_filename)
        if event == "call" and not self._is_sampled and path.is_relative_to(ROOT):
            name = str(path.relative_to(ROOT))
            if not name.startswith("tests/"):
                self.files.setdefault(name)


def files_of_a_decode(
    wired: Wired, monkeypatch: pytest.MonkeyPatch, exchanges: bool = False
) -> list[str]:
    """Trace the engine's last step of a request, which computes one token.

    Without ``exchanges`` Python dispatches its layers.
    """
    engine = wired.cluster.engine
    # On a busy machine an answer may be late, which has a file of its own.
    monkeypatch.setattr(client, "LAST_WAIT_MS", int(LIMIT_S * 1000))
    if not exchanges:
        monkeypatch.setattr(wired.cluster.layers, "_exchanges", None)
    traces: list[Trace] = []
    step = engine.step

    def traced(work: list[ScheduledChunk], *context: Any) -> None:
        assert len(work) == 1
        traces.append(Trace())
        sys.setprofile(traces[-1])
        try:
            step(work, *context)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(engine, "step", traced)
    wired.tokens()
    assert len(traces) == LENGTH
    assert wired.cluster.dispatcher.calls["stream"]
    return list(traces[-1].files)


@contextmanager
def connected(folder: Path, dtype: str) -> Iterator[Wired]:
    wired = Wired(folder, dtype)
    try:
        yield wired
    finally:
        wired.close()


def leave_out_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every module do without native code, as where there was no compiler."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("cluster.", "experts.", "router.")) and hasattr(module, "native"):
            monkeypatch.setattr(module, "native", None)


@pytest.mark.parametrize("dtype", [] if native is None else ["float32", "bfloat16"])
def test_a_decode_step_passes_the_files_of_the_document_in_their_order(
    folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    with connected(folder, dtype) as wired:
        files = files_of_a_decode(wired, monkeypatch)
    assert files == numbered(ROUTER)
    assert len(files) <= MAX_FILES


@pytest.mark.parametrize("dtype", [] if native is None else ["float32"])
def test_two_native_calls_take_the_place_of_a_layers_dispatch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    with connected(folder, dtype) as wired:
        files = files_of_a_decode(wired, monkeypatch, exchanges=True)
    listed, own = numbered(ROUTER), "router/moe/exchange.py"
    first, last = listed.index("router/moe/dispatch.py"), listed.index("router/moe/combine.py")
    replaced = [file for file in listed[first : last + 1] if file not in files]
    assert set(files) == {*listed, own} - set(replaced)
    assert own in named(ROUTER)
    # What is left of these opens the connections, and has the lanes.
    assert set(listed[first : last + 1]) - set(replaced) == {"cluster/transport/stream/client.py"}


def test_without_native_code_torch_takes_the_place_of_some(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out_native(monkeypatch)
    with connected(folder, "float32") as wired:
        files = set(files_of_a_decode(wired, monkeypatch))
    native_files = {name for name in numbered(ROUTER) if "/cpu/" in name}
    assert set(numbered(ROUTER)) - files == native_files
    assert files - set(numbered(ROUTER)) == named(TORCH)


def test_a_frame_passes_the_actors_files_of_the_document_in_their_order(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actor_module, "end_when_orphaned", lambda lease, app: None)
    trace = Trace()
    threading.setprofile(trace)  # of threads that start from here on: the actor's
    actor = local_actor(folder)
    # It looks at answers on a thread of its own.
    monkeypatch.setattr(actor._queue.self_test, "note_computed", lambda frames, answers: None)
    connector = Connector(lambda *where: actor.offer_stream(where[2]), None)
    transport = StreamTransport(connector, None)
    try:
        for request_id in (1, 2):  # the first call connects
            trace.begins_at = StreamServer._reply.__code__
            trace.files.clear()
            # A lone frame that is traced is not for native code (:mod:`experts.lone`).
            frame = frame_of(rows_of(1), request_id, traceparent=TRACED)
            [outcome] = transport.send([Call("expert-0", 1, (frame,), LIMIT_S)]).wait()
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
        transport.close()
    assert isinstance(decode(outcome), RowsFrame)
    # The thread waits for the next frame in native code.
    others = {*numbered(ROUTER), "experts/lone.py"}
    assert [file for file in trace.files if file not in others] == numbered(ACTOR)
