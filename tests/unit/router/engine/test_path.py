"""The files that a decode step passes, from the engine's step to a sampled token."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from router.engine.sampling import sample
from router.engine.sequence import Work
from tests.checkpoints import save_mixtral
from tests.unit.cluster.transport.wired import LENGTH, Wired

ROOT = Path(__file__).parents[4]
MOST_FILES = 16
LIMIT_S = 20.0


class Trace:
    """The product's files whose functions are called, in order, until a token is sampled."""

    def __init__(self) -> None:
        self.files: dict[str, None] = {}
        self._is_sampled = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """A profile function in the sense of ``sys.setprofile``."""
        if frame.f_code is sample.__code__ and event == "return":
            self._is_sampled = True
        path = Path(frame.f_code.co_filename)
        if event == "call" and not self._is_sampled and path.is_relative_to(ROOT):
            name = str(path.relative_to(ROOT))
            if not name.startswith("tests/"):
                self.files.setdefault(name)


def files_of_a_decode(wired: Wired, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trace the engine's last step of a request, which computes one token."""
    engine = wired.cluster.engine
    traces: list[Trace] = []
    step = engine.step

    def traced(work: list[Work], *context: Any) -> None:
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


@pytest.fixture(params=["float32", "bfloat16"])
def wired(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Wired]:
    save_mixtral(tmp_path)
    wired = Wired(tmp_path, request.param)
    yield wired
    wired.close()


def test_probe(wired: Wired, monkeypatch: pytest.MonkeyPatch) -> None:
    print("\n".join(files_of_a_decode(wired, monkeypatch)))
    assert 0
